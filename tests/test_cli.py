"""The command line: what goes to stdout, what is written, and how it leaves; real models, `main` in this process."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quack_fx
from quack_fx.cli.app import main
from quack_fx.cli.convert import OptimizerChoice
from quack_fx.layout import QKLayout
from quack_fx.train.program.scaling import execute
from quack_fx.train.program.source import OPTIMIZERS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
GPT, MLA = str(EXAMPLES / "gpt.py"), str(EXAMPLES / "mla.py")
PLAIN = """
import torch
from torch import nn
print("the file speaks")
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        print("the forward speaks")
        return self.down(self.up(x).relu())
"""


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    status = main(words)
    out, err = capfd.readouterr()
    return status, out, err


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    ["--help", "--version", "inspect --help", "convert -h", "verify --help", "bench --help", "report -h", "watch -h"],
)
def test_help_comes_without_torch(words: str) -> None:
    code = (
        f"import sys; from quack_fx.cli.app import main; s = main({words.split()!r}); print(s, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False" and done.stderr == ""


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, "--version") == (0, f"quack-fx {quack_fx.__version__}\n", "")


def test_the_installed_program() -> None:
    done = subprocess.run([str(Path(sys.executable).parent / "quack-fx"), "inspect"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("quack-fx: Missing argument")


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_shows_the_pairs(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "inspect", MLA)
    assert (status, err) == (0, "")
    assert f"MLATransformer(MLAConfig()) of {MLA}" in out
    assert "4 attentions, all equal" in out and "blocks.{0..3}.attn  x4" in out and "MLA 6" in out
    for line in (
        r"uq +q_up.weight +48h:48h\+32",
        r"qr +q_up.weight +48h\+32:48h\+48",
        r"dq +q_down.weight +0:96, every head",
        r"uk +kv_up.weight +64h:64h\+32",
        r"dkv +kv_down.weight +0:64, every head",
        r"kr +kv_down.weight +64:80, every head",
    ):
        assert re.search(line, out), line
    assert "latent norm rms over 96: blocks.0.attn.q_norm" in out
    assert not re.search(r"[ \t]$|\x1b", out, re.MULTILINE)  # plain text, no padding


def test_inspect_as_json_is_the_layout(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "inspect", GPT, "--json")
    assert (status, err) == (0, "")
    layout = QKLayout.from_dict(json.loads(out))
    assert layout.to_dict() == json.loads(out)
    assert [site.name for site in layout.sites] == [f"blocks.{i}.attn" for i in range(4)]
    site = layout.sites[3]
    assert (site.query[0].param, site.query[0].bias) == ("blocks.3.attn.qkv.weight", "blocks.3.attn.qkv.bias")
    assert [block.heads for _, block in site.blocks()] == [
        tuple(((o + 32 * h, o + 32 * h + 32),) for h in range(6)) for o in (0, 192)
    ]


def test_inspect_one_pair(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "inspect", GPT, "--pair", "2.attn")
    assert status == 0 and out.startswith("blocks.2.attn  MHA 6, head dim 32") and "blocks.0" not in out
    status, out, _ = run(capfd, "inspect", GPT, "--pair", "blocks.2.attn", "--json")
    assert [site["name"] for site in json.loads(out)["sites"]] == ["blocks.2.attn"]
    status, out, err = run(capfd, "inspect", GPT, "--pair", "blocks.2.atn")
    assert (status, out) == (2, "") and "no attention is called 'blocks.2.atn'; did you mean 'blocks.2.attn'?" in err


def test_inspect_writes_a_page(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "inspect", GPT, "--html", "page.html")
    assert (status, err) == (0, "quack-fx: wrote page.html\n") and "blocks.{0..3}.attn" in out
    assert (own_folder / "page.html").read_text().startswith("<!doctype html>")
    assert os.listdir(own_folder) == ["page.html"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_attention_is_status_1(options: list[str], own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (own_folder / "model.py").write_text(PLAIN)
    status, out, err = run(capfd, "inspect", "model.py", *options)
    assert status == 1 and err.splitlines()[-1] == "quack-fx: no attention found in MLP() of model.py"
    assert "speaks" not in out and "the file speaks" in err  # what the user's code prints is no result
    if options:
        assert json.loads(out)["sites"] == []


# ---- convert and verify ----------------------------------------------------------------------------------------------


def test_convert_writes_a_file_that_python_reads(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "convert", MLA, "-o", "step.py", "--tau", "0.5")
    assert (status, out, err) == (0, "", "quack-fx: wrote step.py\n")
    source = (own_folder / "step.py").read_text()
    tree = ast.parse(source)
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {m.split(".")[0] for m in modules} <= {"torch", "__future__", *sys.stdlib_module_names}
    assert "0.5" in source and "MLATransformer(MLAConfig())" in source
    assert run(capfd, "convert", MLA, "--tau", "0.5") == (0, source, "")


def test_convert_writes_the_optimizer_that_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert {choice.value for choice in OptimizerChoice} == OPTIMIZERS.keys()
    status, source, err = run(capfd, "convert", MLA, "--optimizer", "muon")
    assert (status, err) == (0, "") and "Muon and AdamW with QuacK" in source.splitlines()[0]
    assert execute(source).STEPS.keys() == {torch.optim.Muon, torch.optim.AdamW}


def test_convert_writes_for_shards_and_for_masters(capfd: pytest.CaptureFixture[str]) -> None:
    """Each option is what `quack_fx.convert` takes by the same name, and there is no more in the file without it."""
    for words, options in (
        ([], {}),
        (["--sharded"], {"sharded": True}),
        (["--master-weights"], {"master_weights": True}),
        (["--sharded", "--master-weights"], {"sharded": True, "master_weights": True}),
    ):
        status, source, err = run(capfd, "convert", GPT, *words)
        assert (status, err) == (0, "")
        assert source == quack_fx.convert(GPT, title=f"GPT(GPTConfig()) of {GPT}", **options)
        assert ("DTensor" in source, "master_param" in source) == ("sharded" in options, "master_weights" in options)


NORMED = """
import torch
from torch import nn
import torch.nn.functional as F

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(16), nn.RMSNorm(16)
    def forward(self, x):
        return F.softmax(self.q_norm(self.q(x)) @ self.k_norm(self.k(x)).mT, -1) @ self.v(x)
"""


def test_convert_tells_of_the_norms_that_it_takes_out(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("model.py").write_text(NORMED)
    words = ["convert", "model.py", "--inputs", "torch.randn(2, 5, 16)", "-o"]
    status, _, told = run(capfd, *words, "strip.py")
    assert status == 0
    assert "the file takes the QK norms out of 1 attentions (2 modules); --qk-norm keep leaves them" in told
    assert "logits were scaled by 1, which relied on the norm" in told
    assert 'yield "q_norm", PassThrough(factor=0.25)' in Path("strip.py").read_text()
    status, _, told = run(capfd, *words, "keep.py", "--qk-norm", "keep")
    assert status == 2 and "take it out first (--qk-norm strip" in told
    status, _, told = run(capfd, *words, "no.py", "--qk-norm", "fold")
    assert status == 2 and "'fold' is not one of 'strip', 'keep'" in told
    assert not Path("keep.py").exists() and not Path("no.py").exists()


def test_convert_and_verify_take_a_layout_from_a_file(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (own_folder / "layout.json").write_text(run(capfd, "inspect", GPT, "--json")[1])
    assert run(capfd, "convert", GPT, "--layout", "layout.json")[:2] == run(capfd, "convert", GPT)[:2]
    status, out, err = run(capfd, "verify", GPT, "--layout", "layout.json")
    assert (status, err) == (0, "") and re.search(r"proved +blocks.\{0..3\}.attn +x4 +[\d,]+ checks", out)


def test_bench_prints_the_table_and_writes_it(
    own_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one way that compiles nothing; the others are those of test_bench.py."""
    monkeypatch.setenv("COLUMNS", "160")
    status, out, err = run(capfd, "bench", GPT, "--rounds", "2", "--ways", "a", "-o", "table.md")
    assert status == 0 and "eager model, fused AdamW" in out and err.endswith("quack-fx: wrote table.md\n")
    assert re.search(r"1\.9M weights, 16% of them in rows of queries and keys, 8 tokens a step", " ".join(out.split()))
    table = (own_folder / "table.md").read_text()
    assert table.startswith("# A training step of GPT") and "| a | eager model, fused AdamW |" in table
    assert run(capfd, "bench", GPT, "--ways", "a", "-o", "table.md")[0] == 2  # it exists


@pytest.mark.slow
def test_bench_compiles_a_file_of_ones_own(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (own_folder / "mine_alone.py").write_text(Path(GPT).read_text())
    status, out, _ = run(capfd, "bench", "mine_alone.py", "--rounds", "2", "--ways", "plain,quack")
    assert status == 0 and "our step with QuacK" in out


def test_verify_proves_what_was_found(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "verify", MLA)
    assert (status, err) == (0, "") and "proved" in out


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_without_attention_there_is_nothing_to_do(
    command: str, own_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (own_folder / "model.py").write_text(PLAIN)
    status, out, err = run(capfd, command, "model.py")
    assert (status, out) == (1, "") and f"nothing to {command}" in err


# ---- files -----------------------------------------------------------------------------------------------------------


def test_force_overwrites_and_keeps_the_rights(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine = own_folder / "mine.py"
    mine.write_text("mine")
    mine.chmod(0o640)
    (own_folder / "link.py").symlink_to(mine)
    assert run(capfd, "convert", GPT, "-o", "link.py", "--force")[0] == 0
    assert (own_folder / "link.py").is_symlink() and "QuacK" in mine.read_text()
    assert stat.S_IMODE(mine.stat().st_mode) == 0o640


def test_new_files_have_usual_rights(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (own_folder / "usual").touch()
    assert run(capfd, "convert", GPT, "-o", "new.py")[0] == 0
    assert (own_folder / "new.py").stat().st_mode == (own_folder / "usual").stat().st_mode


@pytest.mark.parametrize("broken", ["fdopen", "replace"])
def test_a_failing_disk_leaves_nothing_half_written(
    broken: str, own_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_folder / "mine.py").write_text("mine")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    status, _, err = run(capfd, "convert", GPT, "-o", "mine.py", "--force")
    assert status == 2 and re.search("output '.*mine.py' cannot be written: No space left on device", err)
    assert os.listdir(own_folder) == ["mine.py"] and (own_folder / "mine.py").read_text() == "mine"


TALKS = """
import torch
from torch import nn
print("imported")
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        print("built"); print("of", end=" "); print("parts"); print()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
    def forward(self, x):
        print("ran", end="")
        return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
"""


def test_lines_that_the_model_prints_are_shown_once(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is built and run several times until inputs are found."""
    (own_folder / "talks.py").write_text(TALKS)
    status, _, err = run(capfd, "inspect", "talks.py")
    lines = err.splitlines()
    assert status == 0 and len(set(lines)) == len(lines)
    assert lines[:3] == ["imported", "built", "of parts"] and lines[3].startswith("ran")


# ---- terminals -------------------------------------------------------------------------------------------------------


def test_progress_on_a_terminal_is_on_stderr(own_folder: Path) -> None:
    """With stderr a terminal and stdout a file: the stages on the terminal, the JSON alone in the file."""
    ours, theirs = pty.openpty()
    code = f"import sys; from quack_fx.cli.app import main; sys.exit(main(['inspect', {GPT!r}, '--json']))"
    with (own_folder / "out.json").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=out,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 65536):
                shown += data
        except OSError:
            pass  # the other end is closed
    assert process.wait() == 0
    assert b"recording the forward of GPT" in shown
    assert json.loads((own_folder / "out.json").read_text())["schema"] == 1


def test_a_reader_that_stops_early_is_no_error(own_folder: Path) -> None:
    code = f"import sys; from quack_fx.cli.app import main; sys.exit(main(['convert', {MLA!r}]))"
    command = f'"{sys.executable}" -c "{code}" | head -n 1'
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1
