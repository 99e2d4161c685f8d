"""The benchmark over public repositories, on a made-up folder: one file works, one wants a flag, one is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.wilding.attempt import Try, empty
from benchmarks.wilding.entries import Entry, read
from benchmarks.wilding.results import kind_of, next_try, outcome, result
from benchmarks.wilding.table import markdown

ROOT = Path(__file__).parent.parent

ATTENTION = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads, self.embed = heads, nn.Embedding(20, dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
"""
OTHER = ATTENTION + "\n\nclass Other(Net):\n    pass\n\n\nclass Third(Net):\n    pass\n"
REFUSED = "SIZES = {'dim': 16}\n"
ROWS = {"": {"query": ["q.weight", "d*h:d*h+d"], "key": ["k.weight", "d*h:d*h+d"]}}


def test_three_entries_become_a_table(tmp_path: Path) -> None:
    entries = []
    for name, source in (("works", ATTENTION), ("flag", OTHER), ("refused", REFUSED)):
        (tmp_path / f"owner+{name}" / "src").mkdir(parents=True)
        (tmp_path / f"owner+{name}" / "src" / "model.py").write_text(source)
        entry = {"repo": f"owner/{name}", "commit": "", "file": "src/model.py", "run_from": "src", "domain": "language"}
        entries.append(entry | {"attentions": 1, "rows": ROWS})
    entries[1] |= {"flags": {"name": "Third"}, "attentions_flags": 1, "models": ["Third"]}
    listed, page = tmp_path / "list.json", tmp_path / "page.md"
    listed.write_text(json.dumps([*entries, entries[0] | {"repo": "owner/absent"}]))
    command = [sys.executable, "-m", "benchmarks.wild", "--repos", str(tmp_path), "--list", str(listed)]
    command += ["--json", str(tmp_path / "rows" / "rows.jsonl"), "--markdown", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out" in done.stderr and "owner/absent" in done.stderr
    text = page.read_text()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| lang")]
    lines = {line[1]: line[2:7] for line in cells if len(line) > 6}
    assert lines == {
        "`owner/flag:src/model.py (Third)`": [
            "refused: several models to choose from", ":NAME", "1 / 0 / 0", "1 of 1", "yes",
        ],
        "`owner/refused:src/model.py`": ["refused: no model in the file", "-", "", "", ""],
        "`owner/works:src/model.py`": ["works", "", "1 / 0 / 0", "1 of 1", "yes"],
    }  # fmt: skip
    for sums in ("| work with no flag | 1 |", "| work with one flag | 1 |", "| do not work | 1 |"):
        assert sums in text
    assert "| **wrong rows** | **0** |" in text and "| **tracebacks** | **0** |" in text
    assert (
        "of 2 attentions" in text and "| no model in model.py: " in text and "(1 more on the list were not run)" in text
    )
    assert str(tmp_path) not in text

    again = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert again.stdout == "1 of 3 work with no flag, 1 with flags\n"


def test_wrong_rows_and_tracebacks_stand_out() -> None:
    entry = Entry("a/b", "", "m.py", "vision", attentions=3)
    row = empty(Try(entry, (), Path(), Path()))
    good = row | {"code": 0, "sites": 2, "skipped": ["no-softmax"], "rows_wrong": ["x"], "wrong": "head 1 is not"}
    came = result(entry, {(entry.key, ()): good | {"traceback": "f.py:1: KeyError: 3"}})
    assert came is not None and came.works
    assert (came.found, came.refused, came.missed, len(came.wrong)) == (2, 1, 0, 2)
    text = markdown([came], 0, "")
    assert "| **wrong rows** | **2** |" in text and "**TRACEBACK** | f.py:1: KeyError: 3" in text
    crashed = row | {"code": 1, "traceback": "f.py:1: KeyError: 3"}
    assert outcome(entry, crashed) == "TRACEBACK"
    assert outcome(entry, row | {"stopped": "inspect: stopped after 180 s"}) == "timeout"
    assert outcome(replace(entry, models=("A",)), good | {"model": "B"}) == "takes another model"
    assert outcome(replace(entry, attentions=0), row | {"code": 1, "sites": 0}) == "works"
    assert outcome(entry, row | {"code": 1, "sites": 0}) == "finds nothing"


def test_flags_are_tried_alone_before_two() -> None:
    entry = Entry("a/b", "", "m.py", "vision", flags={"name": "N", "build": "N(1)", "inputs": "x"}, attentions_flags=2)
    assert entry.tries() == [(), ("name",), ("build",), ("inputs",), ("build", "inputs")]
    assert entry.words(("name",)) == ["m.py:N"]
    assert entry.words(("build", "inputs")) == ["m.py", "--build", "N(1)", "--inputs", "x"]
    assert [entry.expected(flags) for flags in entry.tries()] == [None, None, 2, None, 2]
    assert next_try(entry, {}) == ()


def test_the_list_is_whole() -> None:
    entries = read(ROOT / "benchmarks" / "wild.json")
    assert len(entries) == 100
    assert all(len(entry.commit) == 40 and entry.target() for entry in entries)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("m.py has 3 models (A, B, C); type m.py:A or m.py:B", "several models to choose from"),
        ("building M(...) of m.py fails: KeyError: 'x'; say what it is: --build 'M()'", "the model cannot be built"),
        ("LMModel is given a module as 'encoder' (SEANetEncoder)", "parts of the model have to be given"),
        ("something else", "another reason"),
    ],
)  # fmt: skip
def test_kinds_of_refusals(line: str, kind: str) -> None:
    assert kind_of(line) == kind
