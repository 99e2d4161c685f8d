"""The documentation and the list of packages keep up with the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import quack_fx

ROOT = Path(__file__).parent.parent


def test_every_code_of_a_refusal_is_documented() -> None:
    """Codes are the first string of a Refused and the second argument of a NearMiss."""
    found: set[str] = set()
    for file in (ROOT / "quack_fx").rglob("*.py"):
        source = file.read_text()
        for code in re.findall(r"(?:Refused\(|NearMiss\(\s*[\w.\[\]]+,)\s*f?\"([a-z{}-]+)\"", source):
            found |= {code.format(name=side) for side in ("query", "key")}
    documented = set(re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "reasons.md").read_text(), re.MULTILINE))
    documented = {code for cell in documented for code in re.findall(r"`([a-z-]+)`", cell)}
    assert {"unknown-query", "no-softmax", "one-key"} <= found
    assert found == documented


def test_every_package_is_installed() -> None:
    """An editable install would not miss one."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [file.parent.relative_to(ROOT) for file in (ROOT / "quack_fx").rglob("__init__.py")]
    assert sorted(listed) == sorted([".".join(folder.parts) for folder in folders] + ["quack_fx.cli"])


def test_the_page_on_programs_shows_what_is_written() -> None:
    """Its pieces of Python are what is about the model in the file for examples/mla.py; the last is the whole file."""
    source = quack_fx.convert(str(ROOT / "examples" / "mla.py"))
    own = source[source.index("# 4 attentions: MLA") : source.index("class QuacK:")]
    *shown, whole = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "program.md").read_text(), re.DOTALL)
    assert whole == source
    assert "\n\n".join(shown).split() == own.split() and all(piece in own for piece in shown)


def test_the_readme_quotes_what_is_written() -> None:
    source = quack_fx.convert(str(ROOT / "examples" / "mla.py"))
    (quoted,) = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.partition("  #")[0] for line in quoted.splitlines()]
    assert len(lines) == 2 and all(f" {line}\n" in source for line in lines)
