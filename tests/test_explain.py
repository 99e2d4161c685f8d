"""How an attention was understood, told node by node: on the command line, in JSON, and in dumped files."""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quack_fx.cli.app import main
from quack_fx.find import explain, find_in_graph, find_qk_pairs
from quack_fx.find.dumps import VARIABLE
from quack_fx.layout.walk import Explanation, Held, RowsOf
from quack_fx.train.program.scaling import execute

MODEL = """\
import torch
import torch.nn.functional as F
from torch import nn


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.g = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        gate = torch.sigmoid(self.g(x))
        q = self.q(x) * gate
        return F.scaled_dot_product_attention(q, self.k(x), self.v(x))


class Additive(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.s = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        both = torch.tanh(self.q(x).unsqueeze(2) + self.k(x).unsqueeze(1))
        return self.s(both).squeeze(-1).softmax(-1) @ self.v(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.gated, self.additive = Gated(), Additive()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(3))

    def forward(self, x):
        x = self.additive(self.gated(x))
        for layer in self.layers:
            x = x + layer(x, x, x)[0]
        return x
"""
INPUTS = ("--inputs", "torch.zeros(1, 3, 8)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    (folder / "wild.py").write_text(MODEL)
    return folder


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")  # whatever other tests have left there
    yield folder


def told(capfd: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    status = main(["inspect", "wild.py:Model", *INPUTS, *options])
    out, err = capfd.readouterr()
    return status, out, err


# ---- what was found --------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """Two heads out of a fused projection, keys after an RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(8, 24, bias=False), nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return F.softmax(q @ self.norm(k).mT, dim=-1) @ v


def test_a_walk_leads_from_the_operand_to_the_weight() -> None:
    (one,) = explain(Fused(), (torch.zeros(1, 3, 8),), {}, "")
    assert (
        one.site is not None and one.site.to_dict() == find_qk_pairs(Fused(), torch.zeros(1, 3, 8)).sites[0].to_dict()
    )
    assert [walk.operand for walk in one.walks] == ["query", "key"]
    for walk, start in zip(one.walks, (0, 8), strict=True):
        first, last = walk.nodes[0], walk.nodes[-1]
        assert first.held is not None and last.held is not None
        assert first.held.rows == (RowsOf("qkv.weight", 0, ((start, start + 8),)),)
        assert first.held.first == (RowsOf("qkv.weight", 0, ((start, start + 4),)),) and first.held.vectors == 2
        assert last.weight == ("qkv.weight",) and last.held.rows == (RowsOf("qkv.weight", 0, ((0, 24),)),)
        assert all(node.source and "test_explain.py" in node.source for node in walk.nodes)
    query, key = (walk.nodes[0].held for walk in one.walks)
    assert query is not None and key is not None
    assert query.norms == () and key.norms == (("rms", 4, "norm", "norm.weight"),)
    assert one.output is not None and one.output.op == "bmm" and one.stopped is None


def test_a_latent_is_walked_to_its_end_and_a_layer_before_is_not() -> None:
    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.down, self.up, self.k = (nn.Linear(a, b) for a, b in ((8, 8), (8, 2), (2, 8), (8, 8)))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.before(x))
            return F.scaled_dot_product_attention(self.up(self.down(x)), self.k(x), x)

    (one,) = explain(Low(), (torch.zeros(1, 3, 8),), {}, "")
    weights = [[name for node in walk.nodes for name in node.weight] for walk in one.walks]
    assert weights == [["up.weight", "down.weight"], ["k.weight"]]


def test_a_shared_layer_is_explained_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Fused()

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x).transpose(1, 2).flatten(2)
            return self.layer(x)

    assert len(explain(Twice(), (torch.zeros(1, 3, 8),), {}, "layer")) == 1


# ---- on the command line ---------------------------------------------------------------------------------------------


def test_a_found_attention(inside: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = told(capfd, "--explain", "1")
    assert (status, err) == (0, "")
    assert out.startswith("layers.1  found: mha, 2 query heads, 2 key heads, head dim 4\n")
    assert "in_proj_weight 0:8; 2 vectors along axis 0, the first in_proj_weight 0:4" in out
    number = MODEL.splitlines().index("            x = x + layer(x, x, x)[0]") + 1
    assert f"wild.py:{number}: x = x + layer(x, x, x)[0]" in out and "layers.0" not in out


def test_a_refused_attention(inside: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = told(capfd, "--explain", "gated", "--json")
    assert (status, err) == (0, "")
    (one,) = json.loads(out)
    assert (one["name"], one["outcome"], one["code"]) == ("gated", "skipped", "unknown-query") and one["site"] is None
    assert one["stopped"]["op"] == "mul" and one["stopped"]["source"] == "wild.py:13: q = self.q(x) * gate"
    assert one["stopped"]["held"]["unknown"]
    assert [[of["param"] for of in node["held"]["rows"]] for node in one["reads"]] == [
        ["gated.q.weight"],
        ["gated.g.weight"],
    ]
    left, right = one["walks"]
    assert left["nodes"][-1]["name"] == one["stopped"]["name"]
    assert [of["param"] for of in right["nodes"][0]["held"]["rows"]] == ["gated.k.weight"]


def test_no_product_of_queries_and_keys(inside: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = told(capfd, "--explain", "additive")
    assert status == 0 and "[additive-attention]" in out
    assert "wild.py:24: return self.s(both).squeeze(-1).softmax(-1) @ self.v(x)" in out and "_softmax" in out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--explain", "gatd"), "no attention is called 'gatd'; did you mean 'gated'?"),
        (("--explain", "gated", "--verify"), "--explain stands alone, or with --json"),
        (("--explain", "gated", "--pair", "gated"), "--explain stands alone, or with --json"),
    ],
)
def test_a_wrong_name(options: tuple[str, ...], line: str, inside: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = told(capfd, *options)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1 and line in err


# ---- files and log ---------------------------------------------------------------------------------------------------


def test_dumped_files_and_the_log(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    quiet = told(capfd, "--json")
    assert quiet[2] == "" and {path.name for path in inside.iterdir()} <= {"wild.py", "__pycache__"}
    monkeypatch.setenv(VARIABLE, "out")
    status, out, err = told(capfd, "--json", "--debug")
    assert (status, out) == quiet[:2]  # watching changes nothing
    files = {path.name: path.read_text("utf-8") for path in Path("out").iterdir()}
    assert files.keys() == {"graph.py", "gated.walk.txt", "layers.0.walk.txt", "layers.2.walk.txt"}
    ast.parse(files["graph.py"])
    assert "wild.py:13 in forward, code: q = self.q(x) * gate" in files["graph.py"]
    assert (
        files["gated.walk.txt"].startswith("gated  skipped: its query side") and "g.weight" in files["gated.walk.txt"]
    )
    assert "quack_fx.find.search: layers.1: equal to an attention that is understood\n" in err
    assert logging.getLogger("quack_fx").handlers == []


def test_a_program_is_dumped_and_a_closed_folder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "deep" / "out"))
    assert execute("answer = 42\n").answer == execute("answer = 43\n").answer - 1
    written = {path.name: path.read_text() for path in (tmp_path / "deep" / "out").iterdir()}
    assert written == {"program.py": "answer = 42\n", "program-2.py": "answer = 43\n"}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    assert execute("answer = 44\n").answer == 44 and "program.py cannot be written" in caplog.text


# ---- plain data ------------------------------------------------------------------------------------------------------


def test_lines_of_an_exported_graph_are_its_own() -> None:
    """The graph of torch.export says itself which line ran each node."""
    program = torch.export.export(Fused(), (torch.zeros(1, 3, 8),))
    from quack_fx.find.explanation import source_of

    graph_module = program.module()
    assert len(find_in_graph(graph_module).sites) == 1  # type: ignore[arg-type]
    lines = {source_of(node) for node in graph_module.graph.nodes if node.op == "call_function"}  # type: ignore[union-attr]
    assert any(line is not None and "test_explain.py" in line and "F.softmax" in line for line in lines)


@pytest.mark.parametrize(
    ("held", "text"),
    [
        (Held(), "no weight rows"),
        (Held(unknown=True, scale=None), "data of unknown rows; times a learned factor"),
        (Held((RowsOf("a.q.weight", 1, ((0, 4),)),)), "q.weight 0:4 (axis 1)"),
        (Held((RowsOf("b.weight", 0, ((0, 4), (8, 12))),), statistic=True), "a statistic of b.weight 0:4, 8:12"),
        (
            Held((RowsOf("a.w", 0, ((0, 8),)),), vectors=2, axes=(1,), first=(RowsOf("a.w", 0, ((0, 4),)),), scale=0.5),
            "w 0:8; 2 vectors along axis 1, the first w 0:4; * 0.5",
        ),
    ],
)
def test_what_a_tensor_holds_in_words(held: Held, text: str) -> None:
    assert held.text("a") == text


def test_json_and_outline_of_a_bare_refusal() -> None:
    one = Explanation("", code="no-softmax", reason="no softmax")
    assert one.text() == "(root)  skipped: no softmax [no-softmax]\n"
    told: dict[str, Any] = json.loads(json.dumps(one.to_dict()))
    assert told["outcome"] == "skipped" and told["walks"] == [] and told["stopped"] is None
