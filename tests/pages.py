"""The code in a page of Markdown, run as a reader would: block after block, in one folder.

In: a Markdown file. Out: its blocks, and `Reader`, which runs them. What a block is checked by depends on its language:

    python     run, in one namespace for the page
    pycon      run in that namespace, and its output compared
    console    the commands behind `$` are run and their output compared
    sh         every line is run and has to succeed; of `make` it is looked whether the target exists
    text       has to say what it is an excerpt of

A comment before a block says more, as `<!-- check: slow file=train.py -->`:

    slow             run with the slow tests alone
    file=NAME        saved in the page's folder under that name, for commands further down
    needs=PACKAGE    skipped where that package is not installed
    excerpt="WORDS"  lines of what `quack-fx WORDS` prints; remarks behind two blanks and # are the page's own
    output="WORDS"   all of what it prints
    by=FILE          run by that test, which no page can hold
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quack_fx.cli.app import main

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(
    r"(?:^<!-- check: (?P<marks>.*?) -->\n)?^(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)
SECONDS = re.compile(r"\d+\.\d s$", re.MULTILINE)
NOT_INSTALLED = re.compile(r"quack-fx: '(\w+):[^']*' needs \1: pip install \1\n")


@dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        language: What stands behind the fence.
        text: The code.
        marks: What the comment before it says; a mark without a value has "".
        line: Where it begins in the file.
    """

    language: str
    text: str
    marks: dict[str, str]
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, from top to bottom."""
    source = page.read_text("utf-8")
    for match in FENCE.finditer(source):
        marks = dict(mark.partition("=")[::2] for mark in shlex.split(match["marks"] or ""))
        line = source.count("\n", 0, match.start("text")) + 1
        yield Block(match["language"], match["text"], marks, line)


@cache
def printed(command: str) -> str:
    """What a command of quack-fx prints, asked for once."""
    out = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        status = main(shlex.split(command))
    assert status == 0, command
    return out.getvalue()


def build_model() -> Any:
    """The model that a reader of the pages has: that of examples/gpt.py, with two layers."""
    spec = importlib.util.spec_from_file_location("model_of_the_pages", ROOT / "examples" / "gpt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(layers=2))


class Reader:
    """Somebody who does what a page says, in a folder with the examples, a `model.py` and a `build_model()`."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.names: dict[str, Any] = {"__name__": page.stem, "build_model": build_model}
        shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "examples" / "gpt.py", folder / "model.py")

    def read(self, block: Block) -> None:
        """Check one block; an assertion or the block's own exception says what is wrong with it."""
        if "by" in block.marks:
            assert (ROOT / block.marks["by"]).is_file(), f"{self._where(block)}: there is no {block.marks['by']}"
        elif "file" in block.marks:
            compile(block.text, block.marks["file"], "exec")
            (self.folder / block.marks["file"]).write_text(block.text)
        elif "excerpt" in block.marks:
            self._excerpt(block, printed(block.marks["excerpt"]))
        elif "output" in block.marks:
            assert block.text == printed(block.marks["output"]), f"{self._where(block)}: not what is printed now"
        else:
            way = {"python": self._python, "pycon": self._pycon, "console": self._console, "sh": self._shell}
            assert block.language in way, f"{self._where(block)}: say how a block of {block.language!r} is checked"
            way[block.language](block)

    def _where(self, block: Block) -> str:
        return f"{self.page.relative_to(ROOT)}:{block.line}"

    def _python(self, block: Block) -> None:
        exec(compile("\n" * (block.line - 1) + block.text, str(self.page), "exec"), self.names)

    def _pycon(self, block: Block) -> None:
        name, said = self._where(block), io.StringIO()
        test = doctest.DocTestParser().get_doctest(block.text, {}, name, str(self.page), block.line - 1)
        test.globs = self.names  # the page's own, so that later blocks know what this one made
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        runner.run(test, out=said.write, clear_globs=False)
        assert runner.failures == 0 and runner.tries, said.getvalue()

    def _console(self, block: Block) -> None:
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            status, out, err = self._run(command)
            assert status == 0, f"{self._where(block)}: {command}\n{err}"
            assert SECONDS.sub("T s", out.rstrip()) == SECONDS.sub("T s", shown.rstrip()), self._where(block)

    def _shell(self, block: Block) -> None:
        for line in block.text.splitlines():
            command = line.partition("  #")[0].strip()
            if command.startswith("make "):
                subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)
            elif command:
                status, _, err = self._run(command)
                # An adapter whose library is not here has to say so, and how to get it.
                assert status == 0 or NOT_INSTALLED.search(err), f"{self._where(block)}: {command}\n{err}"

    def _run(self, command: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of a command in the page's folder; quack-fx runs in this process."""
        program, *words = shlex.split(command)
        if program == "quack-fx":
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main(words)
            return status, out.getvalue(), err.getvalue()
        programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [*programs[program], *words],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    def _excerpt(self, block: Block, whole: str) -> None:
        lines = {line.strip() for line in whole.splitlines()}
        for line in block.text.splitlines():
            known = line.strip() in lines or line.partition("  #")[0].strip() in lines
            assert known, f"{self._where(block)}: no line of the output of {block.marks['excerpt']!r}: {line}"
