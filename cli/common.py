"""What the commands share: progress, from a target to its layout, writing files.

Results go to stdout; everything else, including what the user's code prints, goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console, RenderableType

from quack_fx.errors import LayoutError, TargetError
from quack_fx.graph.forward.machine import without_collecting

if TYPE_CHECKING:
    from quack_fx.find import Found
    from quack_fx.layout import QKLayout
    from quack_fx.report import Facts
    from quack_fx.targets import Target

WIDTH = 120
"""Columns of text that goes to a file."""


@dataclass(frozen=True)
class Finding:
    """A target, its layout, and the facts for reports."""

    target: Target
    layout: QKLayout
    facts: Facts


_command = ExitStack()
"""What stays open while a command runs: the environment of its target."""


def command() -> AbstractContextManager[object]:
    """Context of one command; closes the environment of its target at the end."""
    return closing(_command)


class _EachLineOnce:
    """A stream that writes every line once: the model's code may run many times until inputs are found."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._begun, self._seen = stream, "", {""}

    def write(self, text: str) -> int:
        """Write the lines that end in this text, if they are new."""
        *lines, self._begun = (self._begun + text).split("\n")
        new = [line for line in dict.fromkeys(lines) if line not in self._seen]
        self._seen.update(new)
        self._stream.writelines(f"{line}\n" for line in new)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def prints_on_stderr() -> Iterator[None]:
    """Context in which what the model's code prints goes to stderr, every line once."""
    stream = _EachLineOnce(sys.stderr)
    with redirect_stdout(cast("TextIO", stream)):
        try:
            yield
        finally:
            stream.write("\n")  # the end of the last line


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A status line on stderr while something runs, if stderr is a terminal."""
    console = Console(stderr=True)
    with prints_on_stderr():
        if not console.is_terminal:
            yield lambda text: None
            return
        with console.status("starting") as status:
            yield lambda text: status.update(text)


def find(
    target: str, build: str | None, inputs: str | None, layout_file: Path | None = None, real: bool = False
) -> Finding:
    """Build a target and find its layout, or read the layout from `layout_file`.

    The environment of the target's files stays open until the command ends. With `real`, for a model that can train,
    the files only stay importable: compiled code must not depend on stand-ins.

    Raises:
        QuackError: Bad input, reported in one line.
    """
    given = read_layout(layout_file) if layout_file else None
    with progress() as say:
        say("loading torch")
        start = time.perf_counter()
        with without_collecting():
            from quack_fx.find import find as find_pairs
            from quack_fx.report import Facts
            from quack_fx.targets import opened, resolve

        if real:
            resolved = resolve(target, build=build, inputs=inputs, real=True, progress=say)
            _command.enter_context(resolved.importable())
        else:
            resolved = _command.enter_context(opened(target, build=build, inputs=inputs, progress=say))
        shapes = {name: tuple(p.shape) for name, p in resolved.model.named_parameters()}
        facts = Facts(resolved.title, resolved.how, shapes=shapes, notes=resolved.notes)
        if given is not None:
            from quack_fx.layout.fit import check_layout

            check_layout(given, resolved.model)
            return Finding(resolved, given, facts)
        call = (resolved.model, resolved.args, resolved.kwargs)
        found = find_pairs(*call, progress=say, recording=resolved.recording)
    facts = replace(facts, graph=_graph_text(found), seconds=time.perf_counter() - start)
    return Finding(resolved, found.layout, facts)


def _graph_text(found: Found) -> str:
    """How the graph was recorded, with its limitations."""
    text = f"{found.nodes:,} nodes, recorded with {'fake' if found.way == 'hybrid' else 'real'} weights"
    if found.fallback_reason:
        text += f" (with fake ones: {found.fallback_reason})"
    if found.canned:
        text += f"; results made up where they depend on weights: {', '.join(sorted(set(found.canned)))}"
    return text


def read_layout(path: Path) -> QKLayout:
    """A layout from its JSON file.

    Raises:
        LayoutError: The file cannot be read, or is not a layout.
    """
    from quack_fx.layout import QKLayout

    try:
        return QKLayout.from_dict(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise LayoutError(f"the layout {str(path)!r} cannot be read: {error.strerror}") from error
    except LayoutError as error:
        raise LayoutError(f"{str(path)!r} is not a layout: {error}") from error
    except ValueError as error:
        raise LayoutError(f"{str(path)!r} is not JSON ({error}); make it with inspect --json") from error


def check_output(path: Path | None, force: bool) -> None:
    """Refuse an output file, if there is one, that cannot be written, before the work begins.

    Raises:
        TargetError: The file exists, is a folder, or its folder is missing or not writable.
    """
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir():
        raise TargetError(f"output {str(path)!r} is a folder; give the name of a file")
    if path.exists() and not force:
        raise TargetError(f"output {str(path)!r} exists; add --force to overwrite it")
    if not folder.is_dir():
        raise TargetError(f"output {str(path)!r}: there is no folder {str(folder)!r}; make it first")
    if not os.access(folder, os.W_OK):
        raise TargetError(f"output {str(path)!r}: the folder {str(folder)!r} is not writable; give another")


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically, and report it on stderr.

    Raises:
        TargetError: The file cannot be written.
    """
    given, path = path, path.resolve()  # keep a symbolic link, and write to its target
    temporary = ""
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        raise TargetError(f"output {str(path)!r} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    note(f"wrote {given}")


def _umask() -> int:
    mask = os.umask(0o022)  # can only be read by setting it
    os.umask(mask)
    return mask


def show(*parts: RenderableType) -> None:
    """Print results on stdout; unless that is a terminal, as plain text without padding."""
    console = Console()
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    width = None if "COLUMNS" in os.environ else WIDTH
    plain = Console(width=width, color_system=None, highlight=False)
    with plain.capture() as captured:
        plain.print(*parts, sep="\n")
    sys.stdout.write("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n")


def nothing_to(do: str, finding: Finding) -> bool:
    """Whether a model has no attention, for commands without a report: that and the notes go to stderr."""
    note_notes(finding)
    if not finding.layout.sites:
        note(f"no attention found in {finding.facts.title}: nothing to {do}")
    return not finding.layout.sites


def note_notes(finding: Finding) -> None:
    """Print the notes about how the target was built on stderr."""
    for about, text in finding.facts.notes:
        note(f"{about}: {text}")


def note(text: str) -> None:
    """Print one line on stderr."""
    print(f"quack-fx: {text}", file=sys.stderr)
