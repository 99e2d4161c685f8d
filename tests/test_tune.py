"""`quack-fx tune`: its runs against training by hand, what it makes of bytes, and what it says of made-up losses."""

from __future__ import annotations

import copy
import math
import re
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quack_fx import QuacK, find_qk_pairs
from quack_fx.bench.normed import with_qk_norm
from quack_fx.bench.tune import Arm, Outcome, Plan, Task, models_of, tune
from quack_fx.bench.tune_advice import advice, markdown
from quack_fx.bench.tune_text import language_model, text_of
from quack_fx.cli.app import main
from quack_fx.errors import StepError

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import gpt
import mla

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
GPT, MLA = str(EXAMPLES / "gpt.py"), str(EXAMPLES / "mla.py")
SMALL = "GPT(GPTConfig(layers=1, width=24, heads=2, context=16))"
SEQUENCES, POSITIONS, VOCABULARY = 2, 8, 32
NONE, NORM, QUACK = Arm("none"), Arm("qk-norm"), Arm("quack", 0.5)


def small_gpt(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return gpt.GPT(gpt.GPTConfig(VOCABULARY, POSITIONS, layers=2, heads=2, width=16, bias=False))


def batches(seed: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(VOCABULARY, (SEQUENCES, POSITIONS + 1), generator=generator)
        yield (ids[:, :-1], ids[:, 1:]), {}


@pytest.fixture(scope="module")
def task() -> Task:
    ids = torch.zeros(SEQUENCES, POSITIONS, dtype=torch.int64)
    return Task(small_gpt, find_qk_pairs(small_gpt(), ids), None, batches, list(islice(batches(99), 8)))


def plan(*arms: Arm, lrs: tuple[float, ...] = (1e-2,), seeds: int = 1, **given: Any) -> Plan:
    return Plan(arms, lrs, seeds, **{"steps": 12, "optimizer": "adamw", "seconds": 600.0, **given})


# ---- runs ------------------------------------------------------------------------------------------------------------


def by_hand(task: Task, lr: float, tau: float | None, seed: int) -> float:
    """The same training with torch's own loop, and QuacK attached to the optimizer."""
    model = copy.deepcopy(task.model(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    if tau is not None:
        QuacK(optimizer, model, task.layout, tau)
    for done, (args, kwargs) in zip(range(12), task.batches(seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 10 * (done + 1) / 12)
        model(*args, **kwargs)[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sum(float(model(*args, **kwargs)[1]) for args, kwargs in task.held_out) / len(task.held_out)


@pytest.mark.parametrize(("arm", "tau"), [(NONE, None), (QUACK, 0.5), (Arm("quack", 10.0), 10.0)])
def test_a_run_is_training_by_hand(task: Task, arm: Arm, tau: float | None) -> None:
    outcomes = list(tune(task, plan(arm, seeds=2)))
    assert [outcome.seed for outcome in outcomes] == [0, 1]
    for outcome in outcomes:
        assert outcome.loss == pytest.approx(by_hand(task, 1e-2, tau, outcome.seed), abs=1e-5)


def test_runs_leave_the_model_as_it_was_and_repeat(task: Task) -> None:
    first = models_of(task, 0)
    assert isinstance(first.bare, nn.Module) and isinstance(first.normed, nn.Module)
    before = [p.clone() for p in (*first.bare.parameters(), *first.normed.parameters())]
    own = plan(NONE, NORM, QUACK, lrs=(1e-2, 3e-2))
    one, other = ([(o.arm, o.lr, o.loss) for o in tune(task, own, models)] for models in (first, None))
    assert one == other and len({loss for _, _, loss in one}) == 6
    after = (*first.bare.parameters(), *first.normed.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_muon_trains_what_lies_between_embeddings_and_head(task: Task) -> None:
    losses = {o.arm: o.loss for o in tune(task, plan(NONE, QUACK, NORM, optimizer="muon"))}
    assert len({*losses.values()}) == 3 and all(loss < 4 for loss in losses.values())


def test_the_order_is_balanced() -> None:
    points = list(plan(NONE, QUACK, lrs=(1.0, 0.1, 10.0, 100.0), seeds=2).points())
    assert [seed for seed, _, _ in points] == [0] * 8 + [1] * 8
    assert {lr for _, lr, _ in points[:4]} == {1.0, 10.0}


def test_a_run_that_is_not_over_in_time_does_not_count(task: Task) -> None:
    assert list(tune(task, plan(NONE, seconds=-1.0))) == []


def test_a_run_that_diverges_has_no_loss(task: Task) -> None:
    (outcome,) = tune(task, plan(NONE, lrs=(1e30,)))
    assert outcome.diverged


def test_batches_that_end_are_told(task: Task) -> None:
    short = Task(task.model, task.layout, None, lambda seed: islice(batches(seed), 5), task.held_out)
    with pytest.raises(StepError, match="the batches end after 5; 12 steps need as many"):
        list(tune(short, plan(NONE)))


def test_a_model_with_qk_norm_loses_it_for_the_other_runs(task: Task) -> None:
    """What trains without is the model that the norms were put into."""
    normed = with_qk_norm(small_gpt(), task.layout)
    assert isinstance(normed, nn.Module)
    layout = find_qk_pairs(normed, torch.zeros(SEQUENCES, POSITIONS, dtype=torch.int64))
    assert all(site.qk_norm for site in layout.sites)
    own = Task(lambda seed: copy.deepcopy(normed), layout, None, batches, task.held_out)
    losses = [{o.arm: o.loss for o in tune(each, plan(NONE, NORM, QUACK))} for each in (task, own)]
    for arm in (NONE, NORM, QUACK):
        assert losses[0][arm] == pytest.approx(losses[1][arm], abs=1e-5)


def test_mla_gets_its_norms_in_a_graph() -> None:
    torch.manual_seed(0)
    model = mla.MLATransformer(mla.MLAConfig(layers=1))
    own = Task(
        lambda seed: model, find_qk_pairs(model, *next(batches(0))[0]), None, batches, list(islice(batches(9), 2))
    )
    models = models_of(own, 0)
    assert isinstance(models.normed, torch.fx.GraphModule)
    outcomes = list(tune(own, plan(NONE, NORM, steps=3), models))
    assert [o.arm for o in outcomes] == [NONE, NORM] and outcomes[0].loss != outcomes[1].loss


# ---- bytes for language models ---------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Attention over tokens that sees what is to be seen, with an output to choose."""

    def __init__(self, causal: bool = True, head: int = 40, named: bool = False) -> None:
        super().__init__()
        self.causal, self.named = causal, named
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, head)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, tokens: Tensor, scale: Any = None) -> Any:
        x = self.embed(tokens)
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = self.head(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return SimpleNamespace(logits=y) if self.named else {"logits": y, "hidden": x}


IDS = torch.zeros(2, 4, dtype=torch.int64)


def test_a_model_that_gives_logits_is_trained_on_the_bytes_that_follow() -> None:
    found = language_model(Tokens(), (IDS,), {}, given=False)
    assert (found.tokens, found.targets, found.vocabulary, found.shape) == (0, None, 40, (8, 64))
    model, text = Tokens(), torch.arange(200, dtype=torch.uint8)
    (ids, following), kwargs = next(found.batches(text, 0))
    assert ids.shape == (8, 64) and kwargs == {} and torch.equal((ids + 1) % 40, following % 40)
    logits = model(ids)["logits"].flatten(0, 1)
    assert torch.equal(found.loss(model, ids, following), F.cross_entropy(logits, following.flatten()))
    held_out = found.held_out(text)
    assert len(held_out) == 8 and int(held_out[0][0][0][0, 0]) == 0 and int(held_out[-1][0][1][-1, -1]) == 199 % 40


def test_a_model_that_wants_targets_gets_them() -> None:
    """examples/gpt.py gives the logits of all tokens where it is given targets alone."""
    model = gpt.GPT(gpt.GPTConfig(context=32))
    found = language_model(model, (IDS,), {}, given=False)
    assert (found.targets, found.vocabulary, found.shape) == ("targets", 256, (8, 32))
    (ids, following), _ = next(found.batches(torch.arange(256, dtype=torch.uint8), 0))
    with torch.no_grad():
        assert torch.allclose(found.loss(model, ids, following), model(ids, following)[1], atol=1e-6)


def test_a_batch_has_the_size_that_its_user_gave() -> None:
    assert language_model(Tokens(), (), {"tokens": IDS}, given=True).shape == (2, 4)


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (Tokens(causal=False), (IDS,), "sees the tokens that it would be asked for; give --batches"),
        (Tokens(head=7), (IDS,), r"predicts no following tokens \(its output has no logits for every token\)"),
        (Tokens(named=True), (IDS,), "predicts no following tokens"),
        (Tokens(), (IDS, IDS), "this one takes 2 tensors, 2 of them such"),
        (Tokens(), (torch.zeros(2, 4),), "this one takes 1 tensors, 0 of them such"),
    ],
)
def test_what_is_no_language_model_is_refused(model: nn.Module, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(StepError, match=message):
        language_model(model, args, {}, given=True)


def test_text_of_a_file_and_of_python(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)))
    training, held_out = text_of(path, 8)
    assert (training.tolist(), held_out.tolist()) == (list(range(190)), list(range(190, 200)))
    assert b"import" in bytes(text_of(None, 8)[1].tolist())
    with pytest.raises(StepError, match=r"text' is too short: 200 bytes, and 220 are needed"):
        text_of(path, 9)


# ---- what is said of losses ------------------------------------------------------------------------------------------


def said(losses: dict[tuple[Arm, float], list[float]], **given: Any) -> str:
    outcomes = [Outcome(arm, lr, seed, loss, 1.0) for (arm, lr), own in losses.items() for seed, loss in enumerate(own)]
    arms, lrs = list(dict.fromkeys(arm for arm, _ in losses)), tuple(dict.fromkeys(lr for _, lr in losses))
    return "\n".join(advice(outcomes, plan(*arms, lrs=lrs, **given)))


def test_a_difference_at_every_seed_is_told() -> None:
    text = said({(NONE, 1e-2): [2.0, 2.1, 2.2], (QUACK, 1e-2): [1.9, 2.0, 2.09]})
    assert "lowest loss: QuacK, tau 0.5, lr 0.01: 1.997 ± 0.095 (3 seeds)" in text
    assert "QuacK, tau 0.5 (lr 0.01) against none (lr 0.01): -0.103 ± 0.006, better at every seed" in text


def test_one_that_is_worse_is_told_too() -> None:
    text = said({(NONE, 1e-2): [2.0, 2.1], (NORM, 1e-2): [2.5, 2.61]})
    assert "lowest loss: none, lr 0.01" in text and "+0.505 ± 0.007, worse at every seed" in text


@pytest.mark.parametrize(
    ("quack", "verdict"),
    [([1.9, 2.2], "± 0.141, cannot tell"), ([1.99, 2.0], "cannot tell"), ([1.9], "one seed cannot tell")],
)
def test_what_seeds_do_not_show_is_not_claimed(quack: list[float], verdict: str) -> None:
    assert verdict in said({(NONE, 1e-2): [2.0, 2.1], (QUACK, 1e-2): quack})


def test_ways_are_compared_at_their_own_best_rates_and_divergence_is_told() -> None:
    nan = math.nan
    text = said({
        (NONE, 1e-3): [2.4, 2.5], (NONE, 1e-2): [2.0, 2.1], (NONE, 1e-1): [1.0, nan],
        (QUACK, 1e-3): [2.4, 2.5], (QUACK, 1e-2): [1.95, 2.05], (QUACK, 1e-1): [1.7, 1.8],
    })  # fmt: skip
    assert "QuacK, tau 0.5 (lr 0.1) against none (lr 0.01): -0.300 ± 0.000, better" in text
    assert "none diverged at lr 0.1" in text and "lr 0.1 is at the end of the range: a higher one may be better" in text


def test_without_a_sound_run_nothing_is_told() -> None:
    assert "nothing can be told" in said({(NONE, 1e-2): [math.nan]}) and "nothing" in said({(NONE, 1e-2): []})
    text = said({(NONE, 1e-2): [math.nan], (QUACK, 1e-2): [1.0]})
    assert "no sound run without QuacK and QK norm" in text and "against" not in text


def test_a_seed_that_was_not_finished_does_not_count() -> None:
    text = said({(NONE, 1e-2): [2.0, 2.2], (QUACK, 1e-2): [1.9]})
    assert "lowest loss: QuacK, tau 0.5, lr 0.01: 1.900 (1 seed)" in text
    assert "-0.100; one seed cannot tell" in text


def test_points_that_were_not_run_are_told() -> None:
    text = said({(NONE, 1e-2): [2.0], (QUACK, 1e-2): []})
    assert "not run: 1 of 2 points of the table" in text
    outcomes = [Outcome(NONE, 1e-2, 0, 2.0, 1.0)]
    assert "| QuacK, tau 0.5 | - |" in markdown(outcomes, plan(NONE, QUACK))


# ---- the command -----------------------------------------------------------------------------------------------------


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(words)
    out, err = capfd.readouterr()
    return status, out, err


TINY = ("--build", SMALL, "--steps", "2", "--lr", "1e-2", "--tau", "1", "--seeds", "2")


def test_the_command_prints_the_table_and_writes_it(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "tune", GPT, *TINY, "-o", "table.md")
    assert status == 0 and err.endswith("quack-fx: wrote table.md\n")
    assert f"{SMALL} of {GPT}: 6 of 6 runs of 2 steps, adamw" in " ".join(out.split())
    rows = dict(re.findall(r"^ *(none|QK norm|QuacK, tau 1)  +(\d\.\d{3} ± \d\.\d{3})", out, re.MULTILINE))
    assert len(rows) == 3 and "lowest loss: " in out
    table = (own_folder / "table.md").read_text()
    assert all(f"| {name} | {loss} |" in table for name, loss in rows.items())
    assert run(capfd, "tune", GPT, *TINY, "-o", "table.md")[0] == 2  # it exists


def test_the_command_takes_batches_of_ones_own(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (own_folder / "data.py").write_text(
        "import torch\n\n\ndef batches(seed):\n    torch.manual_seed(seed)\n    for _ in range(10):\n"
        "        ids = torch.randint(256, (2, 9))\n        yield {'idx': ids[:, :-1], 'targets': ids[:, 1:]}\n"
    )
    status, out, _ = run(capfd, "tune", GPT, *TINY, "--batches", "data.py:batches")
    assert status == 0 and "6 of 6 runs" in out
    status, _, err = run(capfd, "tune", GPT, *TINY, "--batches", "data.py:batches", "--steps", "3")
    assert status == 2 and err.endswith("quack-fx: the batches end after 2; 3 steps need as many\n")
    text = (own_folder / "data.py").read_text().replace("'targets'", "'labels'")
    (own_folder / "wrong.py").write_text(text)
    status, _, err = run(capfd, "tune", GPT, *TINY, "--batches", "wrong.py:batches")
    assert status == 2 and "--batches: the model fails on the first batch: TypeError" in err.splitlines()[-1]


BAD = {
    "--lr 1,fast": "--lr '1,fast': 'fast' is no positive number; write for example --lr 0.1,1",
    "--tau 0": "--tau '0': '0' is no positive number",
    "--lr ,": "--lr ',': '' is no positive number",
    "--optimizer sgd": "--optimizer 'sgd': choose from adamw, muon",
    "--data a --batches b.py:c": "--data and --batches are both given; give one of them",
    "--batches b": "--batches 'b': write FILE.py:NAME or package.module:NAME",
    "--batches b.py:c": "--batches 'b.py:c' cannot be loaded: FileNotFoundError",
    "--batches os.path:nothing": "--batches 'os.path:nothing': 'os.path' has no function 'nothing'",
    "--batches os.path:basename": "--batches 'os.path:basename' fails for seed 0: TypeError",
    "--data missing": "--data 'missing' cannot be read: No such file or directory",
    "-o no/such/folder.md": "there is no folder",
    "--steps 0": "Invalid value for '--steps'",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(words: str, own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "tune", GPT, "--build", SMALL, *words.split())
    assert (status, out) == (2, "") and BAD[words] in err.splitlines()[-1]
    assert err.count("\n") == 1 and "Traceback" not in err


def test_a_model_without_attention_is_told(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (own_folder / "plain_net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.up = nn.Linear(8, 8)\n\n    def forward(self, x):\n        return self.up(x)\n"
    )
    status, out, err = run(capfd, "tune", "plain_net.py")
    assert (status, out) == (1, "") and "no attention found in Net() of plain_net.py: nothing to tune" in err


def test_runs_without_a_finite_loss_are_told(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "tune", GPT, *TINY, "--lr", "1e30")
    assert status == 1 and "no run ended with a finite loss" in out


@pytest.mark.slow
def test_the_example_is_tuned_within_ten_minutes(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    status, out, _ = run(capfd, "tune", MLA)
    assert status == 0 and "lowest loss" in out and time.monotonic() - start < 600
