"""QuacK in people's trainers: the real libraries run the files of examples/trainers; `make trainers` installs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quack_fx

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "trainers"
MOST_LINES = 80

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries


def trainer(name: str, *packages: str) -> Any:
    """The module of an example; skips where its packages are not installed."""
    for package in packages:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def assert_scaled(metrics: Mapping[str, float], tau: float) -> None:
    """The learning rates have left where they began."""
    scales = [value for name, value in metrics.items() if name.endswith("lr_scale/min")]
    assert scales and all(0 < scale <= 2 * tau for scale in scales)
    assert any(abs(scale / tau - 1) > 1e-3 for scale in scales)
    assert any(name.endswith("qk_norm_product/max") for name in metrics)


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    AcceleratorState = pytest.importorskip("accelerate.state").AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_examples_are_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) >= 7
    assert {file.name: n for file in files if (n := len(file.read_text().splitlines())) > MOST_LINES} == {}


@pytest.mark.parametrize(
    ("name", "packages", "tau"), [("hf_trainer", ("accelerate",), 0.5), ("trl_sft", ("trl", "peft"), 1.0)]
)
def test_the_trainer_of_transformers_resumes_to_the_bit(
    name: str, packages: tuple[str, ...], tau: float, tmp_path: Path
) -> None:
    example = trainer(name, *packages)
    whole = example.trainer_of(str(tmp_path), steps=6)
    whole.train()
    resumed = example.trainer_of(str(tmp_path), steps=6)
    with torch.no_grad():  # so that factors which are not loaded would be others; what is frozen is not saved
        for p in resumed.model.parameters():
            p.mul_(1.5 if p.requires_grad else 1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(whole.model, resumed.model)
    assert torch.equal(whole.quack.init_factors, resumed.quack.init_factors)
    logged = [entry for entry in whole.state.log_history if "loss" in entry]
    assert len(logged) == 6
    assert_scaled(logged[-1], tau)


def test_accelerate_takes_the_steps_of_a_plain_loop(no_accelerator: None) -> None:
    """With gradients of two batches a step; the same to the bit."""
    example = trainer("accelerated", "accelerate")
    from accelerate import Accelerator

    model, quack, losses = example.train(Accelerator(cpu=True, gradient_accumulation_steps=2), steps=8)
    torch.manual_seed(0)
    plain = type(model)(model.config)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    layout = quack_fx.find_qk_pairs(plain, input_ids=torch.zeros(1, 16, dtype=torch.int64))
    quack_fx.QuacK(optimizer, plain, layout, tau=0.5)
    for i in range(8):
        tokens = torch.stack([(torch.arange(16) + 8 * i + j) % 32 for j in range(8)])
        loss = plain(input_ids=tokens, labels=tokens).loss
        assert float(loss.detach()) == losses[i]
        (loss / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, plain)
    assert_scaled(quack.metrics(), 0.5)


def test_accelerate_in_bf16_logs_to_its_tracker(no_accelerator: None, tmp_path: Path) -> None:
    """Autocast computes in bf16; weights, norms and factors stay as they are."""
    example = trainer("accelerated", "accelerate")
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class Kept(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        def __init__(self) -> None:
            super().__init__()
            self.entries: list[dict[str, float]] = []

        def store_init_configuration(self, values: Any) -> None:
            pass

        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            self.entries.append(values)

    kept = Kept()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2, log_with=kept)
    accelerator.init_trackers("quack")
    model, _, losses = example.train(accelerator, steps=12)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[-1] < losses[0] and len(kept.entries) == 12
    assert_scaled(kept.entries[-1], 0.5)


def test_lightning_resumes_to_the_bit(tmp_path: Path) -> None:
    example = trainer("lightning_callback", "lightning")
    whole, callback = example.fit(str(tmp_path), steps=6)
    resumed, again = example.fit(str(tmp_path), steps=6, resume=tmp_path / "step=3.ckpt")
    assert_same(whole, resumed)
    assert torch.equal(callback.quacks[0].init_factors, again.quacks[0].init_factors)
    (header, *_) = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "attention/model.layers.1.self_attn/qk_norm_product/max" in header
    assert_scaled(again.quacks[0].metrics(), 0.5)


def test_adapters_of_peft_train_by_the_rule() -> None:
    """A at most at tau, by |A| |W| at the start over |B| |W|; the base stays, and the loss falls."""
    example = trainer("peft_lora", "peft")
    model = example.adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quack = example.train(model)
    report = next(iter(quack.factors().values()))
    at = "base_model.model.model.layers.0.self_attn"
    for side, other, heads in (("q", "k", 4), ("k", "q", 2)):
        a, b = (f"{at}.{side}_proj.lora_{x}.default.weight" for x in "AB")
        first = before[a].double().norm() * largest(before[f"{at}.{other}_proj.base_layer.weight"])
        branch = model.get_parameter(f"{at}.{other}_proj.lora_A.default.weight").detach().double().norm()
        met = largest_met(model, b, f"{at}.{other}_proj", float(branch))
        assert report[f"{a}[0:4]"] == pytest.approx(min(1.0, float(first) / met), rel=1e-5)
        assert report[f"{a}[0:4]"] < 1.0
        assert before[b].count_nonzero() == 0 and model.get_parameter(b).count_nonzero() > 0
        assert sum(name.startswith(b) for name in report) == heads
    for name, p in model.named_parameters():
        assert p.requires_grad or torch.equal(p, before[name])


def largest(weight: Tensor) -> float:
    """The largest norm of the rows of a head, eight each."""
    return float(weight.detach().double().unflatten(0, (-1, 8)).flatten(1).norm(dim=1).max())


def largest_met(model: nn.Module, b: str, other: str, branch: float) -> float:
    """The largest |B_h| times what the query or key head at its other side has, over pairs of heads that meet."""
    own, base, low = (
        model.get_parameter(name).detach().double().unflatten(0, (-1, 8)).flatten(1).norm(dim=1)
        for name in (b, f"{other}.base_layer.weight", f"{other}.lora_B.default.weight")
    )
    heads = max(len(own), len(base))
    read = [norms.repeat_interleave(heads // len(norms)) for norms in (own, base, low)]
    return float((read[0] * torch.maximum(read[1], branch * read[2])).max())


@pytest.mark.slow  # `make trainers` runs it, too
def test_torchrun_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    """FSDP2 on two ranks, then on one; tests/test_checkpoints.py compares to the bit."""
    said = ""
    for ranks in (2, 1):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        said += python(*command, str(EXAMPLES / "fsdp2_dcp.py"), str(tmp_path / "run"))
    lines = [line.split() for line in said.splitlines() if line.startswith("step")]
    assert [int(line[1]) for line in lines] == [1, 2, 3, 4, 5, 6]
    losses, products = ([float(line[i]) for line in lines] for i in (3, -1))
    assert losses == sorted(losses, reverse=True) and products == sorted(products)


TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.skipif(
    find_spec("torchtitan") is None or find_spec("triton") is None, reason="torchtitan (with triton) is not installed"
)
@pytest.mark.parametrize(
    ("config", "ranks", "site", "blocks"),
    [
        ("llama3_debugmodel", TWO_RANKS, "layers.0.attention.inner_attention", {"q", "k"}),
        ("deepseek_v3_debugmodel", (), "layers.0.attention.inner_attention", {"uq", "qr", "dkv", "uk", "kr"}),
    ],
)
def test_torchtitan_trains_and_goes_on(
    config: str, ranks: tuple[str, ...], site: str, blocks: set[str], tmp_path: Path
) -> None:
    """Its own Trainer, checkpoints and logger, sharded or not; the initial factors come back to the bit."""
    run, again = (
        json.loads(
            python(*ranks, str(ROOT / "tests" / "titan_on_cpu.py"), config, str(tmp_path), steps).splitlines()[-1]
        )
        for steps in ("2", "4")
    )
    assert (run["step"], again["step"]) == (2, 4)
    assert run["first"] == again["first"]
    assert {name.split("/")[2] for name in run["metrics"] if name.startswith(f"attention/{site}/")} == {
        *blocks, "qk_norm_product", "growth"
    }  # fmt: skip
    events = b"".join(file.read_bytes() for file in (tmp_path / "tb").rglob("events*"))
    assert f"attention/{site}/qk_norm_product/max".encode() in events


def python(*command: str) -> str:
    """What a Python process of its own prints, as rank 0 of 1."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **({} if "torch.distributed.run" in command else alone), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout
