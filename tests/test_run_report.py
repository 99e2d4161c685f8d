"""A recorded run: what the file holds is what was computed, and what the reports show is what the file holds."""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import pty
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from per_head import LAYOUT, Model, loss_of, train
from rich.console import Console
from tiny_models import example
from torch.optim import SGD, AdamW

from quack_fx import QuacK, RunLog, compile_train_step, find_qk_pairs
from quack_fx.cli.app import main
from quack_fx.errors import RunError
from quack_fx.report import run as report
from quack_fx.report.run import heatmap
from quack_fx.report.run.chart import nice_ticks
from quack_fx.report.run.read import MOST_SAMPLES, Record, Run, RunFile, Sample, printable, read
from quack_fx.report.run.series import curves, growth, number, spread, thinned
from quack_fx.report.run.terminal import spark

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@dataclass
class Given:
    """Metrics that a test sets; what `RunLog` asks of a QuacK."""

    numbers: dict[str, float]

    def metrics(self, heads: bool = False) -> dict[str, float]:
        assert heads
        return self.numbers


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a record, by a parser that takes no NaN."""
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def record_of(path: Path, losses: dict[int, float], heads: tuple[float, ...] = (1.0, 2.0)) -> Path:
    """Write a record with a loss for each step, and products that grow with the step."""
    given = Given({})
    log = RunLog(path, given)
    for step, loss in losses.items():
        given.numbers = {f"attention/a/qk_norm_product/head_{i}": h + step * h for i, h in enumerate(heads)}
        given.numbers |= {f"attention/a/q/lr_scale/head_{i}": 1 / (1 + step * h) for i, h in enumerate(heads)}
        log.log(step, loss=loss)
    return path


def shown(file: RunFile, width: int = 120) -> str:
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(report.summary(file))
    return captured.get()


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_step", [False, True])
def test_a_record_holds_the_metrics_of_its_step(by_step: bool, tmp_path: Path) -> None:
    model = Model()
    optimizer = AdamW(model.parameters(), lr=0.02)
    step = compile_train_step(model, optimizer, loss_of, layout=LAYOUT, compile=False) if by_step else None
    quack = step or QuacK(optimizer, model, LAYOUT)
    log, expected, losses = RunLog(tmp_path / "run.jsonl", quack), [], []
    for i in range(4):
        if step is None:
            train(model, optimizer, steps=range(i, i + 1))
        loss = torch.tensor(1.5 + i) if step is None else step(i)
        log.log(i, loss=loss, lr=0.02)
        expected.append(quack.metrics(heads=True))
        losses.append(float(loss))
    found = read(tmp_path / "run.jsonl").run
    assert [r.own for r in found.records] == [{"loss": loss, "lr": 0.02} for loss in losses]
    for sample, metrics in zip(found.samples, expected, strict=True):
        by_head = {f"attention/{s}/{m}/head_{i}": v for (s, m), vs in sample.heads.items() for i, v in enumerate(vs)}
        assert by_head == {name: value for name, value in metrics.items() if "/head_" in name}
    for record, metrics in zip(found.records, expected, strict=True):
        for kind in ("qk_norm_product", "norm", "lr_scale", "growth"):
            highest = max(value for name, value in metrics.items() if name.endswith(f"{kind}/max"))
            assert record.attention[f"{kind}/max"] == highest


@settings(deadline=None)
@given(
    st.lists(st.tuples(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=4), st.text(max_size=5)), min_size=1, max_size=5)
)
def test_every_number_survives(rows: list[tuple[float, list[float], str]]) -> None:
    """NaN, infinities, names in any script: valid JSON, and the same numbers when read."""
    with tempfile.TemporaryDirectory() as folder:
        path, given_ = Path(folder, "run.jsonl"), Given({})
        log = RunLog(path, given_)
        for step, (loss, heads, name) in enumerate(rows):
            given_.numbers = {f"attention/{name}é/q/norm/head_{i}": value for i, value in enumerate(heads)}
            log.log(step, **{f"loss {name}": torch.tensor(loss, dtype=torch.float64)})
        lines_of(path)
        found = read(path).run
    for record, sample, (loss, heads, name) in zip(found.records, found.samples, rows, strict=True):
        assert same(record.own[printable(f"loss {name}")], loss)
        (values,) = sample.heads.values()
        assert all(map(same, values, heads)) and len(values) == len(heads)


def test_summaries_that_follow_from_the_heads_are_left_out(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.jsonl", Given({"attention/a/q/norm/max": 2.0, "attention/a/q/norm/head_0": 2.0}))
    log.log(0)
    (line,) = lines_of(tmp_path / "run.jsonl")
    assert {name for name in line if name != "time"} == {"step", "attention/a/q/norm"}


def test_a_file_cut_anywhere_is_read_up_to_its_last_whole_line_and_appended_to(tmp_path: Path) -> None:
    whole = record_of(tmp_path / "whole.jsonl", {0: 3.0, 1: 2.0, 2: math.nan}).read_bytes()
    path = tmp_path / "run.jsonl"
    for size in [*range(0, len(whole), 7), *(at + 1 for at, byte in enumerate(whole) if byte == ord("\n"))]:
        path.write_bytes(whole[:size])
        lines = whole[:size].count(b"\n")
        if lines:
            file = read(path)
            assert [r.step for r in file.run.records] == list(range(lines))
            assert file.unfinished == (not whole[:size].endswith(b"\n"))
            assert ("not complete" in shown(file)) == file.unfinished
        else:
            with pytest.raises(RunError, match="has no whole line yet"):
                read(path)
        RunLog(path).log(9, loss=1.0)
        assert [line["step"] for line in lines_of(path)] == [*range(lines), 9]


@pytest.mark.slow
def test_a_killed_process_leaves_a_file_that_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    code = f"""
import itertools
from quack_fx import RunLog
log = RunLog({str(path)!r})
for step in itertools.count():
    log.log(step, **{{f"number {{i}}": i / 7 for i in range(3000)}})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    while not path.exists() or path.stat().st_size < 1 << 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [r.step for r in read(path).run.records]
    assert steps == list(range(len(steps))) and len(steps) > 3
    RunLog(path).log(len(steps), loss=1.0)
    assert [line["step"] for line in lines_of(path)] == [*steps, len(steps)]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=6))
def test_a_growing_file_is_read_like_a_whole_one(parts: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = record_of(Path(folder, "whole.jsonl"), {0: 3.0, 1: 2.0, 2: 1.0, 5: 1.5}).read_bytes()
        path = Path(folder, "run.jsonl")
        file = RunFile(path)
        assert not file.update()
        for size in [int(part * len(whole)) for part in sorted(parts)] + [len(whole)]:
            path.write_bytes(whole[:size])
            file.update()
            assert len(file.run.records) == whole[:size].count(b"\n")
        assert not file.update()
        assert file.run == read(Path(folder, "whole.jsonl")).run


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = record_of(tmp_path / "run.jsonl", {0: 3.0, 1: 2.0})
    file = read(path)
    record_of(tmp_path / "other.jsonl", {7: 1.0, 8: 1.0, 9: 1.0}).rename(path)
    assert file.update() and [r.step for r in file.run.records] == [7, 8, 9]
    path.write_text("")
    file.update()
    assert file.run.records == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40))
def test_what_is_recorded_again_takes_the_place_of_what_was_there(steps: list[int]) -> None:
    """A resumed run: of each step the last record counts, and none that a later one has gone back behind."""
    run = Run()
    for i, step in enumerate(steps):
        heads = {("a", "q/norm"): [float(i)]}
        run.add(Record(step, 0.0, {"loss": float(i)}, {}), heads)
    expected: dict[int, float] = {}
    for i, step in enumerate(steps):
        expected = {known: value for known, value in expected.items() if known < step} | {step: float(i)}
    assert {r.step: r.own["loss"] for r in run.records} == expected
    assert {s.step: s.heads["a", "q/norm"][0] for s in run.samples} == expected
    assert run.last is not None and run.last.step == steps[-1]
    assert run.restarts == [b for a, b in itertools.pairwise(steps) if b < a]


def test_a_resumed_run_goes_on_in_its_file(tmp_path: Path) -> None:
    path = record_of(tmp_path / "run.jsonl", {0: 5.0, 10: 4.0, 20: 3.0, 30: 99.0})
    record_of(path, {20: 3.5, 30: 2.5, 40: 2.0})
    file = read(path)
    assert [(r.step, r.own["loss"]) for r in file.run.records] == [(0, 5.0), (10, 4.0), (20, 3.5), (30, 2.5), (40, 2.0)]
    assert "went on from an earlier step" in shown(file) and "step 20" in shown(file) and "99" not in shown(file)


def test_a_step_that_is_logged_twice_has_the_numbers_of_both(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.jsonl")
    log.log(3, loss=2.0, lr=0.1)
    log.log(3, **{"val/loss": 2.5})
    (record,) = read(log.path).run.records
    assert record.own == {"loss": 2.0, "lr": 0.1, "val/loss": 2.5}


def test_a_step_may_be_a_whole_number_of_another_package(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.jsonl")
    log.log(torch.tensor(7), loss=2.0)  # type: ignore[arg-type]
    assert [record.step for record in read(log.path).run.records] == [7]


def test_a_long_run_keeps_few_samples_and_all_numbers() -> None:
    run = Run()
    for step in range(5000):
        run.add(Record(step, 0.0, {"loss": 1.0}, {}), {("a", "q/norm"): [float(step)]})
    assert len(run.records) == 5000 and len(run.samples) <= MOST_SAMPLES + 1
    steps = [s.step for s in run.samples]
    assert steps[0] == 0 and len({b - a for a, b in itertools.pairwise(steps)}) == 1
    assert run.last == Sample(4999, {("a", "q/norm"): [4999.0]})


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = Model()
    quack = QuacK(SGD(model.parameters(), lr=0.1), model, LAYOUT)
    with RunLog(tmp_path / "run.jsonl", quack, tensorboard=str(tmp_path / "board")) as log:
        for step in (0, 10):
            log.log(step, loss=2.0 + step)
        events = EventAccumulator(str(tmp_path / "board")).Reload()  # nothing waits for the end
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 2.0), (10, 12.0)]
    assert set(events.Tags()["scalars"]) == {"loss", *quack.metrics()}
    name = "attention/layers.0/q/norm/max"
    assert events.Scalars(name)[0].value == pytest.approx(quack.metrics()[name])


def test_without_tensorboard_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match="tensorboard='board' needs the package tensorboard: pip install tensorboard"):
        RunLog(tmp_path / "run.jsonl", tensorboard="board")


# ---- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tables of the section on every head, attributes of all tags, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._summary, self._in_summary = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "details":
            self._summary = ""
        self._in_summary = tag == "summary" or (self._in_summary and tag == "code")
        if tag == "tr":
            self.tables.setdefault(self._summary, []).append([])
        if tag in ("td", "th") and self._summary:
            self.tables[self._summary][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "summary":
            self._in_summary = False
        elif tag == "table":
            self._summary = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_summary:
            self._summary += data
        elif self._summary in self.tables and self.tables[self._summary][-1]:
            self.tables[self._summary][-1][-1] += data


@pytest.fixture(scope="module")
def mla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of examples/mla.py, 12 steps."""
    module, path = example("mla"), tmp_path_factory.mktemp("run") / "mla.jsonl"
    torch.manual_seed(0)
    model = module.MLATransformer(module.MLAConfig())
    tokens = torch.randint(64, (2, 16))
    optimizer = AdamW(model.parameters(), lr=0.02)
    log = RunLog(path, QuacK(optimizer, model, find_qk_pairs(model, tokens)))
    for step in range(12):
        _, loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.log(step, loss=loss, lr=optimizer.param_groups[0]["lr"])
    return path


def test_every_head_of_the_file_is_in_the_page(mla: Path) -> None:
    page, last = Page(report.html(read(mla))), lines_of(mla)[-1]
    words = {"norm": "norm", "lr_scale": "learning-rate scale"}
    lists = {name: value for name, value in last.items() if isinstance(value, list)}
    assert len(lists) == 4 * 13
    for name, values in lists.items():
        _, site, *metric = name.split("/")
        title = "norm product" if metric == ["qk_norm_product"] else f"{metric[0]} {words[metric[1]]}"
        (row,) = (row for row in page.tables[site] if row[0] == title)
        assert row[1:] == [f"{value:.4g}" for value in values]
    for i in range(4):
        assert page.tables[f"blocks.{i}.attn"][0] == ["head", *map(str, range(6))]
        first = next(row for row in page.tables[f"blocks.{i}.attn"] if row[0] == "norm product, step 0")
        assert first[1:] == [f"{v:.4g}" for v in lines_of(mla)[0][f"attention/blocks.{i}.attn/qk_norm_product"]]


def test_tables_behind_curves_have_their_numbers(mla: Path) -> None:
    page, lines = Page(report.html(read(mla))), lines_of(mla)
    rows = page.tables["Numbers"]
    for line in lines:
        assert [f"{line['step']}", f"{line['loss']:.4g}"] in rows
        products = [v for name, values in line.items() if name.endswith("qk_norm_product") for v in values]
        assert [f"{line['step']}", f"{max(products):.4g}"] in [row[:2] for row in rows]


def test_a_page_loads_nothing_and_says_in_words_what_it_draws(mla: Path) -> None:
    html = report.html(read(mla))
    page = Page(html)
    assert not re.search(r"https?://|<script|@import|<link", html)
    assert all(
        value is not None and value.startswith("data:image/png;base64,")
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href")
    )
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(a.get("aria-label") if a.get("role") == "img" else a.get("aria-hidden") for a in pictures)
    labels = [a["aria-label"] or "" for a in pictures if "aria-label" in a]
    last = lines_of(mla)[-1]
    assert any(label.startswith("loss over steps 0 to 11") and f"to {last['loss']:.4g}," in label for label in labels)
    assert any("Learning-rate scale of uq, 24 rows of 4 attentions" in label for label in labels)


def cells_of(page: str) -> list[list[list[int]]]:
    """The colour numbers of all heat maps, out of their PNG data."""
    found = []
    for text in re.findall(r"data:image/png;base64,([\w+/=]+)", page):
        data = base64.b64decode(text)
        width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
        start = data.index(b"IDAT")
        raw = zlib.decompress(data[start + 4 : start + 4 + int.from_bytes(data[start - 4 : start])])
        rows = [list(raw[i * (width + 1) : (i + 1) * (width + 1)]) for i in range(height)]
        assert len(raw) == height * (width + 1) and all(row[0] == 0 for row in rows)
        found.append([row[1:] for row in rows])
    return found


def test_a_cell_has_the_colour_of_its_scale(tmp_path: Path) -> None:
    scales = [[1.0, 0.5], [0.5, 0.5], [0.25, 1.0], [math.nan, 0.5]]
    log = RunLog(tmp_path / "run.jsonl", given_ := Given({}))
    for step, heads in enumerate(scales):
        given_.numbers = {f"attention/a/q/lr_scale/head_{i}": value for i, value in enumerate(heads)}
        log.log(step)
    # Two octaves are the full colour: 16 shades below the neutral one, 16.
    assert cells_of(report.html(read(log.path))) == [[[16, 8, 0, 33], [16, 16, 24, 16]]]


def test_the_page_of_a_long_run_of_a_large_model_is_small() -> None:
    """5,000 steps, 48 layers, 128 heads of latent attention with scales at random, which compress worst."""
    source = random.Random(0)
    samples = []
    for _ in range(7):
        heads: dict[tuple[str, str], list[float]] = {}
        for layer in range(48):
            site = f"model.layers.{layer}.self_attn"
            heads[site, "qk_norm_product"] = [source.lognormvariate(0, 3) for _ in range(128)]
            heads[site, "max_attn_logit"] = [source.lognormvariate(0, 3) for _ in range(128)]
            for block, n in (("dq", 1), ("uq", 128), ("qr", 128), ("dkv", 1), ("uk", 128), ("kr", 1)):
                for metric in ("norm", "lr_scale"):
                    heads[site, f"{block}/{metric}"] = [source.lognormvariate(0, 3) for _ in range(n)]
        samples.append(heads)
    file = RunFile(Path("run.jsonl"))
    for step in range(5000):
        own = {f"number {i}": source.gauss(0, 1) for i in range(8)}
        low_high = {
            f"{kind}/{how}": source.random() for kind in ("lr_scale", "qk_norm_product") for how in ("min", "max")
        }
        file.run.add(Record(step, float(step), own, low_high), samples[step % 7])
    page = report.html(file)
    assert len(page.encode()) < 2_000_000
    assert len(Page(page).tables) > 48


def test_a_page_says_where_numbers_are_not_finite(tmp_path: Path) -> None:
    path = record_of(tmp_path / "run.jsonl", {0: 3.0, 1: 2.0, 2: math.inf, 3: math.nan, 4: math.nan})
    page = report.html(read(path))
    assert "loss is not finite at 3 steps, first at step 2" in page and "loss is not finite at 3 steps" in shown(
        read(path)
    )
    assert page.count('class="broken" d=') == 3 and "nan" not in re.sub(r"base64,[\w+/=]+", "", page)


@pytest.mark.parametrize(
    "records",
    [
        [{}],
        [{"loss": 1.0}],
        [{"loss": math.nan}, {"loss": math.nan}],
        [{"loss": 0.0}, {"loss": -1e308}, {"loss": 1e308}],
        [{"loss": 1e-300}, {"loss": 1e300}],
        [{"loss": 1.0}, {"lr": 1.0}, {"loss": 2.0}],
        [{"<b>loss</b>": 1.0, "attention/<i>/q/lr_scale/head_0": 1.0}],
        [{"attention/qk_norm_product/head_0": 0.0}, {"attention/qk_norm_product/head_0": 2.0}],
        [{"attention/a/q/lr_scale/head_0": 0.0}, {"attention/a/q/lr_scale/head_0": math.inf}],
        [{"attention/a/growth/max": 2.0, "attention/a/qk_norm_product/max": 3.0}],
        [{"attention/a/max_attn_logit/head_0": 7.0}],
        [{"attention/a/something_new/head_0": 7.0}],
        [{"attention/a/q/lr_scale/head_0": 1.0}, {"loss": 1.0}, {"attention/b/k/lr_scale/head_0": 1.0}],
    ],
    ids=str,
)
def test_whatever_a_record_has_is_shown(records: list[dict[str, float]], tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.jsonl", given_ := Given({}))
    for step, numbers in enumerate(records):
        given_.numbers = {name: value for name, value in numbers.items() if name.startswith("attention/")}
        log.log(step, **{name: value for name, value in numbers.items() if name not in given_.numbers})
    file = read(log.path)
    page, text = report.html(file), shown(file)
    assert "<b>loss" not in page and "<i>" not in page
    for name in records[-1]:
        if name.startswith("attention/") and "/head_" in name:
            assert number(records[-1][name]) in Page(page).text
    for curve in curves(file.run):
        assert curve.title in Page(page).text and curve.title in text


def test_the_heads_that_grew_most_come_first(tmp_path: Path) -> None:
    run = Run()
    run.add(Record(0, 0.0, {}, {}), {("a", "qk_norm_product"): [1.0, 2.0, 0.0, 1.0], ("b", "qk_norm_product"): [4.0]})
    last = {("a", "qk_norm_product"): [3.0, 2.0, 1.0, math.nan], ("b", "qk_norm_product"): [8.0]}
    run.add(Record(1, 0.0, {}, {}), last | {("a", "max_attn_logit"): [9.0, 8.0, 7.0, 6.0]})
    grown = [(g.site, g.head, g.ratio, g.logit) for g in growth(run, 5)]
    assert math.isnan(grown[0][2]) and grown[0][:2] == ("a", 3)
    assert grown[1:] == [("a", 2, math.inf, 7.0), ("a", 0, 3.0, 9.0), ("b", 0, 2.0, None), ("a", 1, 1.0, 8.0)]
    assert len(growth(run, 2)) == 2


# ---- curves ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=300), st.integers(6, 60))
def test_thinning_loses_no_extreme(values: list[float], limit: int) -> None:
    points = list(enumerate(values))
    kept = thinned(points, limit)
    assert len(kept) <= limit + 5 and [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert all(any(step == s and same(y, values[s]) for s, _ in points) for step, y in kept)
    finite = [y for y in values if math.isfinite(y)]
    if finite:
        still = [y for _, y in kept if math.isfinite(y)]
        assert (min(still), max(still)) == (min(finite), max(finite))
    assert any(not math.isfinite(y) for _, y in kept) == (len(finite) < len(values))
    assert kept[0][0] == 0 and kept[-1][0] == len(values) - 1


@settings(deadline=None)
@given(st.lists(st.integers(), min_size=1, max_size=50), st.integers(2, 20))
def test_spread_keeps_both_ends(items: list[int], limit: int) -> None:
    kept = spread(items, limit)
    assert len(kept) == min(limit, len(items)) and (kept[0], kept[-1]) == (items[0], items[-1])


@settings(deadline=None)
@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_ticks_are_few_and_within(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    ticks = nice_ticks(low, high, 5)
    slack = (high / 2 - low / 2) * 1e-6
    assert len(ticks) <= 6 and all(low - slack <= tick <= high + slack for tick in ticks)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=80), st.integers(1, 40))
def test_a_curve_in_characters_fits(values: list[float], width: int) -> None:
    line = spark(list(enumerate(values)), width)
    assert len(line) == min(width, len(values))
    assert ("!" in line) == any(not math.isfinite(value) for value in values)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_report_prints_a_summary_and_writes_a_page(mla: Path, own_folder: Path, capfd: Any) -> None:
    assert main(["report", str(mla), "--html", "run.html"]) == 0
    out, err = capfd.readouterr()
    last = lines_of(mla)[-1]
    assert f"{last['loss']:.4g}" in out and "12 records, steps 0 to 11" in out and "Heads that grew most" in out
    assert err == "quack-fx: wrote run.html\n" and not re.search(r"[ \t]$|\x1b", out, re.MULTILINE)
    assert (own_folder / "run.html").read_text("utf-8") == report.html(read(mla))


def test_names_that_cannot_be_printed_are_escaped(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    RunLog("run.jsonl").log(0, **{"\ud800": 1.0, "a\nb": 2.0, "\x1b[31mred": 3.0})
    assert main(["report", "run.jsonl", "--html", "run.html"]) == 0
    out = capfd.readouterr().out
    assert all(name in out for name in ("\\ud800", "a\\nb", "\\x1b[31mred")) and "\x1b[31mred" not in out


GOOD = '{"step": 0, "loss": 1.0}\n'
# name: (files, command line, what the one line says)
CASES: dict[str, tuple[dict[str, str], str, str]] = {
    "no file named": ({}, "report", "Missing argument 'FILE'; see quack-fx report --help"),
    "no such file": ({}, "report nope.jsonl", "there is no record 'nope.jsonl'; quack_fx.RunLog writes one while"),
    "a folder": ({"d/x": ""}, "report d", "the record 'd' cannot be read: Is a directory"),
    "nothing yet": ({"r": ""}, "report r", "the record 'r' has no whole line yet; try again when a step was recorded"),
    "half a line": ({"r": GOOD[:9]}, "report r", "the record 'r' has no whole line yet"),
    "no JSON": ({"r": GOOD + "step 1\n"}, "report r", r"'r', line 2: it is not JSON \(.*\); give a file that quack_fx"),
    "no text": ({"r": GOOD + "\0\0\n"}, "report r", r"'r', line 2: it is not JSON"),
    "a list": ({"r": "[1]\n"}, "report r", "'r', line 1: it is no record of a step; give a file that quack_fx.RunLog"),
    "no step": ({"r": '{"loss": 1}\n'}, "report r", "line 1: it is no record of a step"),
    "half a step": ({"r": '{"step": 0.5}\n'}, "report r", "line 1: it is no record of a step"),
    "a word": ({"r": '{"step": 0, "optimizer": "adamw"}\n'}, "report r", "'optimizer' is 'adamw', which is no number"),
    "a truth": ({"r": '{"step": 0, "done": true}\n'}, "report r", "'done' is True, which is no number"),
    "too large": ({"r": '{"step": 0, "n": 1' + "0" * 400 + "}\n"}, "report r", "'n' is 10+[.]{3}, which is no number"),
    "a list of its own": (
        {"r": '{"step": 0, "loss": [1, 2]}\n'},
        "report r",
        r"'loss' is \[1, 2\], which is no number",
    ),
    "no heads": ({"r": '{"step": 0, "attention/a/growth": []}\n'}, "report r", r"'attention/a/growth' is \[\], which"),
    "a page that exists": ({"r": GOOD, "p": ""}, "report r --html p", "output 'p' exists; add --force to overwrite it"),
    "the record as a page": (
        {"r": GOOD},
        "report r --html ./r --force",
        "'r' is the record itself; give the page a file",
    ),
    "no such folder": ({"r": GOOD}, "report r --html no/p", "there is no folder"),
    "no terminal": ({"r": GOOD}, "watch r", "watch draws on a terminal, and stdout is none; use quack-fx report r"),
    "no time": ({"r": GOOD}, "watch r --every 0", "Invalid value for '--every'"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_in_one_line(name: str, own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files, words, said = CASES[name]
    for path, text in files.items():
        (own_folder / path).parent.mkdir(exist_ok=True)
        (own_folder / path).write_text(text)
    assert main(words.split()) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("quack-fx: ") and re.search(said, err), err


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda log: log.log(-1), "step -1 is not a whole number of 0 or more; give the number of the step first"),
        (lambda log: log.log(1.0), "step 1.0 is not a whole number"),
        (lambda log: log.log(torch.tensor(-1)), r"step tensor\(-1\) is not a whole number"),
        (lambda log: log.log(True), "step True is not a whole number"),
        (lambda log: log.log(1, step=2), "the name 'step' is taken by the record itself; call your number something"),
        (lambda log: log.log(1, time=2), "the name 'time' is taken"),
        (lambda log: log.log(1, **{"attention/x": 1}), "the name 'attention/x' is taken"),
        (lambda log: log.log(1, loss=torch.ones(2)), r"loss is a tensor of shape \[2\]; give one number, such as loss"),
        (lambda log: log.log(1, loss=torch.ones((), device="meta")), "loss is a Tensor, which is no number; give a f"),
        (lambda log: log.log(1, loss="3"), "loss is '3'; give a number"),
        (lambda log: log.log(1, loss=None), "loss is None; give a number"),
        (lambda log: log.log(1, loss=[1]), "loss is a list, which is no number; give a float"),
        (lambda log: log.log(1, loss=1j), "loss is a complex, which is no number; give a float"),
        (lambda log: log.log(1, loss=10**400), "loss is a int, which is no number; give a float"),
        (lambda log: RunLog(log.path.parent), "cannot be written: Is a directory"),
        (lambda log: RunLog(log.path.parent / "no" / "run.jsonl"), "cannot be written: No such file or directory"),
        (lambda log: RunLog(log.path, SGD([torch.ones(1)])), "quack is a SGD, which has no metrics; give the QuacK of"),
        (lambda log: RunLog("/dev/full"), "^'/dev/full' exists and is not a recorded run"),
        (lambda log: RunLog("a\0b"), "cannot be written: embedded null byte"),
        (lambda log: RunLog(__file__), "test_run_report.py' exists and is not a recorded run; give another file"),
    ],
)
def test_what_cannot_be_recorded_is_refused(call: Callable[[RunLog], Any], said: str, tmp_path: Path) -> None:
    log, before = RunLog(tmp_path / "run.jsonl"), Path(__file__).read_bytes()
    with pytest.raises(RunError, match=said) as caught:
        call(log)
    assert "\n" not in str(caught.value)
    assert log.path.read_bytes() == b"" and Path(__file__).read_bytes() == before


def test_watch_follows_a_file_that_is_made_later_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    ours, theirs = pty.openpty()
    code = f"import sys; from quack_fx.cli.app import main; sys.exit(main(['watch', {str(path)!r}, '--every', '0.1']))"
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "110", "LINES": "40"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    screen = b""

    def wait_for(text: bytes) -> None:
        nonlocal screen
        while text not in screen:
            screen += os.read(ours, 65536)

    wait_for(b"waiting for the first record in")
    log = RunLog(path)
    log.log(0, loss=4.125)
    wait_for(b"4.125")
    with path.open("a") as file:
        file.write('{"step": 10, "lo')
    wait_for(b"not complete")
    with path.open("a") as file:
        file.write('ss": 3.375}\n')
    wait_for(b"3.375")
    rest: list[bytes] = []

    def read_on() -> None:
        with suppress(OSError):  # the process has closed its end
            while part := os.read(ours, 65536):
                rest.append(part)

    # A process whose terminal is full cannot end: it waits to write its last screen.
    reader = threading.Thread(target=read_on, daemon=True)
    reader.start()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    reader.join(timeout=20)
    os.close(ours)
    screen += b"".join(rest)
    assert b"Traceback" not in screen and b"steps 0 to 10" in screen


@pytest.mark.parametrize("width", [50, 60, 84, 100, 200])
def test_numbers_are_whole_at_any_width(width: int, mla: Path) -> None:
    text, last = shown(read(mla), width), lines_of(mla)[-1]
    assert all(len(line) <= width for line in text.splitlines())
    assert f"{last['loss']:.4g}" in text and f"{last['lr']:.4g}" in text
    scales = [v for name, values in last.items() if name.endswith("lr_scale") for v in values]
    assert all(f"{value:.4g}" in text for value in (min(scales), max(scales)))


def test_a_screen_is_filled_and_not_more(tmp_path: Path) -> None:
    path = record_of(tmp_path / "run.jsonl", {0: 3.0, 1: 2.0}, heads=tuple(range(1, 40)))
    for height in (12, 24, 40):
        console = Console(width=100, height=height, color_system=None)
        with console.capture() as captured:
            console.print(report.summary(read(path), live=True))
        assert captured.get().count("\n") <= max(height, 14)


def test_reports_need_no_torch(mla: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from quack_fx.report import run; "
        f"f = run.read(Path({str(mla)!r})); run.html(f); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_heat_maps_keep_within_their_number_of_cells() -> None:
    run = Run()
    for step in range(MOST_SAMPLES):
        run.add(Record(step, 0.0, {}, {}), {(f"{i}", "q/lr_scale"): [1.0] * 100 for i in range(200)})
    (heat,) = heatmap.heat_maps(run)
    assert sum(len(s) * len(s[0]) for _, s in heat.sites) <= 1_000_000 and len(heat.sites) == 200
