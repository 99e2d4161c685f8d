"""The experiment of benchmarks/stability: models and numbers by hand, runs that go on to the same bits, the page."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.stability.__main__ import main
from benchmarks.stability.claims import CLAIMS, answers
from benchmarks.stability.grid import LONG_METHODS, METHODS, PRESETS, Method, Run
from benchmarks.stability.models import ATTENTIONS, Transformer, build, rotate
from benchmarks.stability.probe import attention_logits, largest, mean_change
from benchmarks.stability.records import Record, Records
from benchmarks.stability.summary import Panel, panels, spread
from benchmarks.stability.text import Text, of_file, standard_library
from benchmarks.stability.train import Curves, Result, _InFloat32, train
from quack_fx import find_qk_pairs, verify_qk_pairs
from quack_fx.bench.normed import with_qk_norm

ROOT = Path(__file__).parent.parent
TOY = replace(PRESETS["toy"], bf16=False)
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def text() -> Text:
    return standard_library()


def toy_run(attention: str, method: str, optimizer: str = "muon", lr: float = 3e-2, seed: int = 0) -> Run:
    return Run(attention, optimizer, BY_NAME[method], lr, seed, TOY.steps)


def toy_batch(text: Text) -> tuple[Tensor, Tensor]:
    return text.check_batch(0, TOY.check_batches, TOY.sequences, TOY.positions)


# ---- models and text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_models_have_the_paper_s_pairs(attention: str, text: Text) -> None:
    model, batch = build(attention, TOY.shape, 0), toy_batch(text)
    layout = find_qk_pairs(model, *batch)
    assert [site.kind for site in layout.sites] == [attention] * TOY.shape.layers
    roles = {block.role for _, block in layout.sites[0].blocks()}
    assert roles == {"mha": {"q", "k"}, "mla": {"dq", "uq", "qr", "dkv", "uk", "kr"}}[attention]
    verify_qk_pairs(model, layout, *batch)
    weights = sum(p.numel() for p in build(attention, PRESETS["cpu"].shape, 0).parameters())
    assert 0.75e6 < weights < 0.95e6


def test_weights_depend_on_the_seed_alone() -> None:
    def flat(seed: int) -> Tensor:
        return torch.cat([p.detach().flatten() for p in build("mla", TOY.shape, seed).parameters()])

    before = torch.random.get_rng_state()
    one = flat(1)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(123)
    assert torch.equal(flat(1), one) and not torch.equal(flat(2), one)


def test_batches_are_pieces_of_the_text(text: Text) -> None:
    ids, targets = text.batch(3, 7, 4, 16)
    assert ids.shape == targets.shape == (4, 16) and torch.equal(ids[:, 1:], targets[:, :-1])
    for row, following in zip(ids, targets, strict=True):
        assert bytes([*row.tolist(), int(following[-1])]) in bytes(text.training.tolist())
    assert torch.equal(text.batch(3, 7, 4, 16)[0], ids)
    assert not torch.equal(text.batch(3, 8, 4, 16)[0], ids) and not torch.equal(text.batch(4, 7, 4, 16)[0], ids)


def test_batches_to_check_with_cover_the_held_out_text() -> None:
    held_out = torch.arange(100, dtype=torch.uint8)
    own = Text(torch.zeros(100, dtype=torch.uint8), held_out, "")
    firsts = torch.cat([own.check_batch(i, 3, 2, 9)[0][:, 0] for i in range(3)])
    assert firsts.tolist() == [0, 18, 36, 54, 72, 90] and int(own.check_batch(2, 3, 2, 9)[1].max()) == 99


def test_text_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)))
    own = of_file(path, 8)
    assert own.training.tolist() == list(range(190)) and own.held_out.tolist() == list(range(190, 200))
    with pytest.raises(SystemExit, match=r"has 200 bytes; sequences of 9 need at least 220"):
        of_file(path, 9)
    with pytest.raises(SystemExit, match=r"missing' cannot be read: No such file"):
        of_file(tmp_path / "missing", 8)


# ---- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("long", [False, True])
def test_the_grid_is_balanced_wherever_it_stops(preset: str, long: bool) -> None:
    """Seed by seed; and within a panel no method is ahead of another by more than one run."""
    runs = list(PRESETS[preset].runs(long))
    assert len({run.key for run in runs}) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    compared = {run.method for run in runs}
    assert compared == set(LONG_METHODS if long else METHODS)
    done: Counter[tuple[str, str, Method]] = Counter()
    for run in runs:
        done[run.attention, run.optimizer, run.method] += 1
        fitting = [method for method in compared if method.fits(run.attention, run.optimizer)]
        own = [done[run.attention, run.optimizer, method] for method in fitting]
        assert run.method.fits(run.attention, run.optimizer) and max(own) - min(own) <= 1
    assert {done[run.attention, run.optimizer, run.method] for run in runs} == {len(runs) // len(done)}


@pytest.mark.parametrize("run", [toy_run("mla", "qk-clip 30"), toy_run("mha", "quack 0.1", "adamw", 1e-3, 2)])
def test_a_run_is_its_json(run: Run) -> None:
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


# ---- the probe -------------------------------------------------------------------------------------------------------


def logits_by_hand(model: Transformer, ids: Tensor) -> list[Tensor]:
    """The logits of MHA, in fp64, from the inputs of each attention."""
    inputs: list[Tensor] = []
    handles = [
        block.attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(ids, ids)
    for handle in handles:
        handle.remove()
    found = []
    for block, x in zip(model.blocks, inputs, strict=True):
        q, k = (
            rotate((x @ layer.weight.double().T).unflatten(-1, (TOY.shape.heads, -1)).transpose(1, 2)).double()
            for layer in (block.attn.q, block.attn.k)
        )
        seen = torch.ones(2 * [ids.shape[1]], dtype=torch.bool).tril()
        found.append((q @ k.mT / q.shape[-1] ** 0.5)[..., seen].detach())
    return found


def test_probed_logits_are_those_by_hand(text: Text) -> None:
    model, batch = build("mha", TOY.shape, 0), toy_batch(text)
    probed = attention_logits(model, batch, TOY.sequences, TOY.shape.layers)
    by_hand = logits_by_hand(model, batch[0])
    for one, other in zip(probed, by_hand, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)
    assert largest(probed) == pytest.approx(max(float(one.abs().max()) for one in by_hand), rel=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_probed_logits_of_a_graph_are_those_of_the_model(attention: str, text: Text) -> None:
    """Written out as products, and by the fused op; norms bound them."""
    model, batch = build(attention, TOY.shape, 0), toy_batch(text)
    normed = with_qk_norm(model, find_qk_pairs(model, *batch), (batch, {}))
    assert isinstance(normed, nn.Module)
    one = attention_logits(normed, batch, TOY.sequences, TOY.shape.layers)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        other = attention_logits(normed, batch, TOY.sequences, TOY.shape.layers)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    assert largest(one) <= TOY.shape.head_dim**0.5 + 1e-4  # of two vectors with a mean square of 1
    assert mean_change(one, one) == 0 and mean_change(one, [x + 2 for x in one]) == pytest.approx(2)


def test_a_model_whose_attention_is_not_seen_is_refused(text: Text) -> None:
    with pytest.raises(RuntimeError, match="2 of 3 attentions were seen"):
        attention_logits(build("mha", TOY.shape, 0), toy_batch(text), 1, 3)


def test_a_logit_that_is_no_number_is_the_largest() -> None:
    assert math.isnan(largest([torch.tensor([1.0, math.nan]), torch.tensor([5.0])]))
    assert largest([torch.tensor([1.0, -7.0]), torch.tensor([5.0])]) == 7


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        toy_run("mla", "quack 0.1"),
        toy_run("mha", "quack 1", "adamw"),
        toy_run("mla", "qk-norm"),
        toy_run("mha", "qk-clip 30"),
        toy_run("mha", "constant 0.1", "adamw"),
        toy_run("mla", "none"),
    ],
    ids=lambda run: run.key,
)
def test_an_interrupted_run_ends_at_the_same_bits(run: Run, text: Text, tmp_path: Path) -> None:
    whole = train(run, TOY, text, tmp_path / "whole.pt")
    assert whole is not None and whole.curves.step == [1, 3, 5, 7, 9]
    result, pieces = None, 0
    while result is None:
        steps = iter([False] * 3)
        result = train(run, TOY, text, tmp_path / "pieces.pt", lambda steps=steps: next(steps, True))  # type: ignore[misc]
        pieces += 1
    assert pieces == 4 and not list(tmp_path.iterdir())
    assert replace(result, seconds=0.0) == replace(whole, seconds=0.0)


@pytest.mark.parametrize("method", ["quack 0.01", "qk-norm", "qk-clip 30", "compositional 1", "constant 0.1"])
def test_a_method_changes_the_run(method: str, text: Text, tmp_path: Path) -> None:
    setup = replace(TOY, steps=20)
    clip = Method("qk-clip", threshold=0.5) if method == "qk-clip 30" else BY_NAME[method]
    runs = [Run("mha", "muon", own, 0.3, 0, 20) for own in (BY_NAME["none"], clip)]
    plain, other = (train(run, setup, text, tmp_path / "none.pt") for run in runs)
    assert plain is not None and other is not None
    assert plain.diverged is None and abs(plain.loss - other.loss) > 1e-4
    assert other.largest < plain.largest


def test_a_run_that_diverges_is_recorded(text: Text, tmp_path: Path) -> None:
    result = train(toy_run("mha", "none", lr=1e30), TOY, text, tmp_path / "none.pt")
    assert result is not None and result.diverged is not None and math.isnan(result.loss)
    records = Records.open(tmp_path / "results.jsonl", "toy", TOY, text)
    records.add(Record(toy_run("mha", "none", lr=1e30), result))
    (read,) = records
    assert read.result.diverged == result.diverged and math.isnan(read.result.loss)


def test_muon_orthogonalises_in_float32() -> None:
    """The Newton-Schulz iteration by hand, in fp64; in bfloat16 it is a hundred times as far off."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(6, 10, generator=generator) for _ in range(2))
    x = grad.double() / grad.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    distances = []
    for mode in (_InFloat32(), contextlib.nullcontext()):
        parameter = nn.Parameter(weight.clone())
        parameter.grad = grad.clone()
        with mode:
            torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0).step()
        assert torch.equal(parameter.grad, grad)
        distances.append(float((weight - parameter.detach() - x).norm() / x.norm()))
    assert distances[0] < 1e-5 and distances[1] > 1e-3


def test_bf16_runs(text: Text, tmp_path: Path) -> None:
    """As on a GPU, with gradients of several parts of a batch."""
    with pytest.warns(UserWarning, match="Mismatch dtype"):  # torch's RMS norm, of a bf16 input and an fp32 gain
        result = train(toy_run("mha", "qk-norm"), replace(TOY, bf16=True), text, tmp_path / "none.pt")
    assert result is not None and result.diverged is None and result.loss < 5.545


def test_a_batch_in_parts_is_a_batch(text: Text, tmp_path: Path) -> None:
    """Two parts make the step of a batch that holds both."""

    class Both(Text):
        def batch(self, seed: int, step: int, sequences: int, positions: int) -> tuple[Tensor, Tensor]:
            parts = [text.batch(seed, 2 * step + part, sequences // 2, positions) for part in (0, 1)]
            ids, targets = (torch.cat(own) for own in zip(*parts, strict=True))
            return ids, targets

    run, at_once = toy_run("mha", "quack 1", "adamw"), replace(TOY, sequences=4, accumulate=1, check_batches=1)
    one = train(run, TOY, text, tmp_path / "none.pt")
    other = train(run, at_once, Both(text.training, text.held_out, ""), tmp_path / "none.pt")
    assert one is not None and other is not None
    assert one.curves.loss == pytest.approx(other.curves.loss, rel=1e-3) and abs(one.loss - other.loss) < 1e-3


# ---- results on the disk ---------------------------------------------------------------------------------------------


def made_up(method: str, lr: float, seed: int, loss: float, diverged: int | None = None) -> Record:
    curves = Curves([1, 3], [5.0, loss], [1.0, 10.0 + seed], [0.1, 0.2])
    return Record(toy_run("mha", method, lr=lr, seed=seed), Result(loss, diverged, 10.0 + seed, curves, 1.0))


def test_a_line_that_is_not_whole_is_no_run(text: Text, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    records = Records.open(path, "toy", TOY, text)
    records.add(made_up("none", 3e-2, 0, 2.0))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[-100:-1])
    assert len(list(Records.read(path))) == 1
    records = Records.open(path, "toy", TOY, text)
    assert path.read_bytes() == whole
    records.add(made_up("none", 3e-2, 1, 2.5))
    assert [record.result.loss for record in Records.read(path)] == [2.0, 2.5]


def test_runs_of_another_kind_do_not_mix(text: Text, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Records.open(path, "toy", TOY, text)
    with pytest.raises(SystemExit, match=r"has runs with another setup; give another file"):
        Records.open(path, "toy", replace(TOY, other_lr=1e-3), text)
    with pytest.raises(SystemExit, match=r"another text"):
        Records.open(path, "toy", TOY, replace(text, digest="other"))


@pytest.mark.parametrize("content", ["", "no JSON\n", "[]\n", '{"a": 1}\n'])
def test_what_is_no_file_of_results_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "results").write_text(content)
    with pytest.raises(SystemExit, match="results' is no file of results"):
        Records.read(tmp_path / "results")


def test_results_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"missing' cannot be read: No such file"):
        Records.read(tmp_path / "missing")


# ---- what they say together ------------------------------------------------------------------------------------------


def test_numbers_of_a_panel_are_those_by_hand() -> None:
    records = [
        *(made_up("none", 1e-2, seed, loss) for seed, loss in enumerate((2.0, 2.2))),
        *(made_up("none", 1e-1, seed, loss, diverged) for seed, loss, diverged in ((0, 1.0, None), (1, math.nan, 3))),
        *(made_up("quack 1", 1e-2, seed, loss) for seed, loss in enumerate((2.1, 2.5))),
        *(made_up("quack 1", 1e-1, seed, loss) for seed, loss in enumerate((1.9, 2.3))),
    ]
    (panel,) = panels(reversed(records))
    none, quack = BY_NAME["none"], BY_NAME["quack 1"]
    assert panel.methods == [none, quack] and panel.lrs == [1e-2, 1e-1]
    assert str(panel.point(none, 1e-2).loss) == "2.100 ± 0.141" and panel.point(none, 1e-2).largest == 11.0
    assert panel.point(none, 1e-1).diverged == 1
    assert panel.best(none) == 1e-2 and panel.best(quack) == 1e-1
    assert panel.close(quack) == [1e-1] and panel.close(none) == [1e-2]
    difference = panel.difference(quack, none, panel.best)
    assert (difference.mean, difference.seeds) == (pytest.approx(0.0), 2)
    assert difference.deviation == pytest.approx(math.sqrt(2) * 0.1)
    assert str(panel.point(none, 1e-2).change) == "0.200 ± 0.000"


SMALL_LR, LARGE_LR = 1e-2, 1e-1


def panel_of(attention: str, losses: dict[str, tuple[float | None, float | None]], logit: float = 1.0) -> Panel:
    """Three seeds of each method at two learning rates; None diverged. Without a method, logits and changes are 2."""
    records = []
    for method, own in losses.items():
        for (lr, loss), seed in product(zip((SMALL_LR, LARGE_LR), own, strict=True), range(3)):
            high = 2.0 if method == "none" else logit
            seen = math.nan if loss is None else loss + (0.001 if method == "none" else -0.001) * seed
            result = Result(seen, 2 if loss is None else None, high, Curves([1], [5.0], [high], [high]), 1.0)
            records.append(Record(toy_run(attention, method, lr=lr, seed=seed), result))
    (panel,) = panels(records)
    return panel


AS_IN_THE_PAPER: dict[str, tuple[float | None, float | None]] = {
    "none": (2.00, 2.90),
    "quack 0.01": (2.30, 2.30),
    "quack 0.1": (2.20, 2.20),
    "quack 1": (1.95, 2.10),
    "quack 10": (2.40, 2.90),
    "qk-norm": (1.99, 2.05),
    "qk-clip 30": (1.99, None),
    "qk-clip 100": (2.00, None),
    "constant 0.1": (2.10, 2.15),
}
OTHERWISE: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "At a small learning rate all methods are alike": {"qk-norm": (1.80, 1.80)},
    "At a large one QuacK is stable": {f"quack {tau}": (1.95, 3.00) for tau in (0.01, 0.1, 1, 10)},
    "So is QK norm": {"qk-norm": (1.99, 3.20)},
    "QK clip is not": {"qk-clip 30": (1.99, 2.00)},
    "MHA: QuacK is close to QK norm": {"qk-norm": (1.80, 1.80)},
    "MLA: QuacK is best": {"qk-norm": (1.90, 1.90)},
    "A constant factor on all query and key weights is worse": {"constant 0.1": (1.90, 2.00)},
}


def verdicts(panel: Panel) -> dict[str, str]:
    return {claim.text: answer.verdict for claim, answer in answers(panel)}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_claims_hold_where_they_do_and_not_elsewhere(attention: str) -> None:
    own = {claim.text for claim in CLAIMS if attention in claim.attentions}
    assert verdicts(panel_of(attention, AS_IN_THE_PAPER)) == dict.fromkeys(own, "holds")
    for text in own & set(OTHERWISE):
        assert verdicts(panel_of(attention, AS_IN_THE_PAPER | OTHERWISE[text]))[text] == "does not hold"
    loud = verdicts(panel_of(attention, AS_IN_THE_PAPER, logit=3.0))
    assert {text for text in own if loud[text] != "holds"} == own - set(OTHERWISE)


def test_claims_cannot_tell_where_seeds_differ() -> None:
    assert verdicts(panel_of("mla", AS_IN_THE_PAPER | {"none": (1.9505, 2.90)}))["MLA: QuacK is best"] == "cannot tell"
    diverged = verdicts(panel_of("mla", AS_IN_THE_PAPER | {"quack 1": (None, 2.10), "quack 10": (2.40, None)}))
    assert diverged["At a large one QuacK is stable"] == "does not hold"


def test_one_seed_has_no_spread() -> None:
    assert str(spread([1.0])) == "1.000" and str(spread([])) == "-"


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    words = ["run", "--preset", "toy", "--results", str(results)]
    assert main([*words, "--minutes", "0"]) == 0
    planned = len(list(PRESETS["toy"].runs()))
    assert f"{planned} of {planned} runs are left" in capfd.readouterr().err
    assert main(words) == 0
    done = results.read_bytes()
    assert {record.run for record in Records.read(results)} == set(PRESETS["toy"].runs())
    assert not list(results.with_suffix(".checkpoints").glob("*"))
    assert main(words) == 0 and results.read_bytes() == done  # nothing is done twice
    with pytest.raises(SystemExit, match="has runs with another preset and setup"):
        main(["run", "--preset", "cpu", "--results", str(results)])


@pytest.mark.slow
def test_the_command_stops_cleanly_when_it_is_ended(tmp_path: Path) -> None:
    """A SIGTERM leaves checkpoints and no processes; the file of results is whole."""
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks.stability", "run", "--results", str(results), "--jobs", "1"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not results.exists():
            assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(20)  # the first run is under way
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command goes on with them" in err
    assert len(list(results.with_suffix(".checkpoints").glob("*.pt"))) == 1


def test_the_report_is_made_of_the_results(text: Text, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = Records.open(tmp_path / "results.jsonl", "toy", TOY, text)
    for seed in (0, 1):
        for method in ("none", "quack 1", "qk-norm"):
            records.add(made_up(method, 3e-2, seed, 2.0 + seed))
            records.add(made_up(method, 3e-1, seed, 1.0, 5 if method == "none" and seed else None))
    assert main(["report", "--results", str(records.path), "--docs", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs" / "stability.md").read_text()
    assert "| none | 2.500 ± 0.707 | diverged (1 of 2) |" in page
    assert "loss of quack 1, each at its best learning rate: -1.500 ± 0.707 against none" in page
    pictures = sorted((tmp_path / "docs" / "pictures").iterdir())
    assert [picture.name for picture in pictures] == [
        "stability-change.svg", "stability-logit.svg", "stability-loss.svg", "stability-training.svg",
    ]  # fmt: skip
    texts = {picture: picture.read_text() for picture in pictures}
    assert all(own.startswith("<svg") and "quack 1" in own for own in texts.values())
    main(["report", "--results", str(records.path), "--docs", str(tmp_path / "docs")])
    assert texts == {picture: picture.read_text() for picture in pictures}


def test_a_report_without_runs_is_refused(text: Text, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = Records.open(tmp_path / "results.jsonl", "toy", TOY, text)
    with pytest.raises(SystemExit, match="has no runs yet"):
        main(["report", "--results", str(records.path), "--docs", str(tmp_path)])


@pytest.mark.parametrize(
    "words",
    [["run", "--jobs", "0"], ["run", "--minutes", "-1"], ["run", "--minutes", "nan"], ["run", "--preset", "none"], []],
)
def test_bad_words_are_told(words: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_preset_for_gpus_says_so_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "--preset", "gpu-1b"])
    assert caught.value.code == 2 and "--preset gpu-1b needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["MLA", "MHA"])
def test_the_readme_has_the_numbers_of_the_page(attention: str) -> None:
    section = (ROOT / "README.md").read_text().split("## Does it help?\n")[1].split("\n## ")[0]
    shown = section.split(f"\n{attention} with Muon:\n\n")[1].split("\n\n")[0].splitlines()
    page = (ROOT / "docs" / "stability.md").read_text()
    panel = page.split(f"\n## {attention}, Muon, 300 steps\n")[1].split("Validation loss (nats a byte):\n\n")[1]
    assert len(shown) == 9 and set(shown) <= set(panel.split("\n\n")[0].splitlines())
    long = page.split(f"\n## {attention}, Muon, 1,500 steps\n")[1].split("Largest logit")[0]
    for method in ("none", "quack 0.1", "constant 0.1", "qk-norm"):
        (loss,) = re.findall(rf"^\| {method} \| (\S+ ± \S+) \|$", long, re.MULTILINE)
        assert loss in " ".join(section.split())
