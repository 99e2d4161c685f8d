"""The documentation keeps up with the code: its blocks run, its tables are complete, its site builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, Block, Reader, blocks, printed

import quack_fx
from quack_fx.cli.app import main

PAGES = {
    page.relative_to(ROOT).as_posix(): list(blocks(page))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
FAST = [name for name, code in PAGES.items() if any("slow" not in block.marks for block in code)]
SLOW = [name for name, code in PAGES.items() if any("slow" in block.marks for block in code)]


@pytest.fixture
def reader_folder(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader works; a terminal's width changes what is printed."""
    monkeypatch.delenv("COLUMNS", raising=False)
    return own_folder


def read(name: str, code: list[Block], folder: Path) -> None:
    """Run blocks of a page, those of its own that need a package that is not here left out."""
    reader, missing = Reader(ROOT / name, folder), set()
    for block in code:
        need = block.marks.get("needs")
        if need and importlib.util.find_spec(need) is None:
            missing.add(need)
        else:
            reader.read(block)
    if missing:
        pytest.skip(f"all but what needs {', '.join(sorted(missing))} was run")


# ---- what the pages show ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_what_a_page_shows_is_so(name: str, reader_folder: Path) -> None:
    read(name, [block for block in PAGES[name] if "slow" not in block.marks], reader_folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_all_that_a_page_shows_is_so(name: str, reader_folder: Path) -> None:
    read(name, PAGES[name], reader_folder)


@pytest.mark.parametrize(
    ("text", "language", "marks"),
    [
        ("x = 1\nassert x == 2\n", "python", {}),
        (">>> 1 + 1\n3\n", "pycon", {}),
        ("x = 1\n", "pycon", {}),
        ("$ quack-fx --version\nquack-fx 0.0.0\n", "console", {}),
        ("quack-fx inspect nothing.py\n", "sh", {}),
        ("make nothing\n", "sh", {}),
        ("no such line\n", "text", {"excerpt": "--version"}),
        ("quack-fx\n", "text", {"output": "--version"}),
        ("whatever\n", "text", {}),
        ("make nothing\n", "sh", {"by": "tests/test_nothing.py"}),
    ],
)
def test_what_is_wrong_in_a_page_is_found(text: str, language: str, marks: dict[str, str], reader_folder: Path) -> None:
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        Reader(ROOT / "README.md", reader_folder).read(Block(language, text, marks, 1))


def test_the_page_on_programs_leaves_nothing_out() -> None:
    """Its pieces of Python are all that is about the model in the file for examples/mla.py."""
    source = printed("convert examples/mla.py")
    own = source[source.index("# 4 attentions: MLA") : source.index("class QuacK:")]
    pieces = [block.text for block in PAGES["docs/program.md"] if block.language == "python"][:-1]
    assert "\n\n".join(pieces).split() == own.split() and all(piece in own for piece in pieces)


# ---- tables and lists ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> Any:
    """What makes the reference pages of the site."""
    spec = importlib.util.spec_from_file_location("reference_of_the_site", ROOT / "docs" / "hooks" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_code_of_a_refusal_is_documented(reference: Any) -> None:
    found = reference.sentences()
    documented = set(re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "reasons.md").read_text(), re.MULTILINE))
    documented = {code for cell in documented for code in re.findall(r"`([a-z-]+)`", cell)}
    assert {"unknown-query", "unknown-key", "no-softmax", "one-key"} <= documented
    assert set(found) == documented
    assert found["rows-on-two-axes"] == ["a head reads a part of … that is no set of whole rows along one axis"]
    assert all(len(said) == len(set(said)) > 0 for said in found.values())


def test_every_option_is_listed(reference: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Against the help that the program prints."""
    listed = reference.commands()
    for command in ("inspect", "convert", "verify", "bench", "tune", "report", "watch"):
        (section,) = re.findall(rf"^## quack-fx {command}\n(.*?)(?=^## |\Z)", listed, re.DOTALL | re.MULTILINE)
        assert main([command, "--help"]) == 0
        shown = set(re.findall(r"--[a-z][a-z-]*", capfd.readouterr().out)) - {"--help"}
        assert shown == set(re.findall(r"--[a-z][a-z-]*", section))
    assert "`--optimizer adamw|adam|sgd|muon|lion`" in listed and "| `1.0` |" in listed


def test_every_public_name_is_on_the_page_on_python() -> None:
    named = re.findall(r"^::: quack_fx\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(set(named) - {"errors"}) == quack_fx.__all__ and len(named) == len(set(named))


def test_every_page_is_in_the_contents() -> None:
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    there = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert there <= listed and all((ROOT / page).exists() for page in listed - there)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(n for n in PAGES if n.startswith("docs/"))])
def test_links_within_the_repository_lead_somewhere(name: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / name).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!\w+:|#)([^)\s#]+)", text):
        assert ((ROOT / name).parent / target).exists(), target
