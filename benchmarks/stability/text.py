"""The training text: the sources of Python's standard library as bytes, or a file.

In: nothing, or a file. Out: a `Text`; its batches depend only on a seed and the step number, so an interrupted run
continues with the same batches.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TRAINING = (
    "_collections_abc _pydecimal _pyio _strptime argparse ast base64 bdb calendar cmd codecs compileall configparser "
    "contextlib csv dataclasses datetime difflib dis doctest enum fileinput fractions ftplib functools gettext gzip "
    "heapq imaplib inspect ipaddress locale mailbox mimetypes modulefinder ntpath optparse os pdb pickle pickletools "
    "pkgutil platform plistlib poplib pprint profile pstats pydoc random selectors shutil site smtplib socket "
    "socketserver ssl statistics subprocess tarfile tempfile textwrap threading timeit tokenize trace traceback "
    "tracemalloc turtle typing uuid"
).split()
"""Standard library modules to train on: single files that exist in Python 3.11, 3.12 and 3.13."""

HELD_OUT = "bz2 code filecmp hashlib lzma operator posixpath queue runpy shlex types warnings weakref".split()
"""Modules for the validation loss."""

_HELD_OUT_OF_A_FILE = 20
"""The last `1 / _HELD_OUT_OF_A_FILE` of a file is held out."""


@dataclass(frozen=True)
class Text:
    """Training and validation bytes.

    Attributes:
        training: Training bytes, uint8.
        held_out: Validation bytes, uint8.
        digest: Hash of both, so that only runs on the same text are compared.
    """

    training: Tensor
    held_out: Tensor
    digest: str

    def batch(self, seed: int, step: int, sequences: int, positions: int) -> tuple[Tensor, Tensor]:
        """The training batch of one step: bytes and next bytes, both [sequences, positions]."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.training) - positions, (sequences, 1), generator=generator)
        return _cut(self.training, starts, positions)

    def check_batch(self, number: int, of: int, sequences: int, positions: int) -> tuple[Tensor, Tensor]:
        """One of the validation batches, of equally spaced sequences; they are the same in all runs."""
        last = len(self.held_out) - positions - 1
        starts = torch.linspace(0, last, of * sequences).long()[number * sequences : (number + 1) * sequences]
        return _cut(self.held_out, starts.unsqueeze(1), positions)


def standard_library() -> Text:
    """The default text, which exists on every machine.

    Raises:
        SystemExit: This Python has no sources of its standard library.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    missing = [name for name in (*TRAINING, *HELD_OUT) if not (folder / f"{name}.py").is_file()]
    if missing:
        raise SystemExit(
            f"{str(folder)!r} has no {missing[0]}.py: this Python comes without the sources of its standard library; "
            "use another one, or give --text FILE"
        )
    return _text(*(b"\n".join((folder / f"{n}.py").read_bytes() for n in names) for names in (TRAINING, HELD_OUT)))


def of_file(path: Path, positions: int) -> Text:
    """The bytes of a file; its end is held out.

    Arguments:
        path: The file.
        positions: Positions of a sequence.

    Raises:
        SystemExit: The file cannot be read, or is too short for one validation sequence.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SystemExit(f"--text {str(path)!r} cannot be read: {error.strerror}") from None
    held_out = len(data) // _HELD_OUT_OF_A_FILE
    if held_out < positions + 2:
        raise SystemExit(
            f"--text {str(path)!r} has {len(data):,} bytes; sequences of {positions} need at least "
            f"{_HELD_OUT_OF_A_FILE * (positions + 2):,}"
        )
    return _text(data[:-held_out], data[-held_out:])


def _text(training: bytes, held_out: bytes) -> Text:
    digest = hashlib.sha256(hashlib.sha256(training).digest() + hashlib.sha256(held_out).digest()).hexdigest()
    parts = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (training, held_out)]
    return Text(parts[0], parts[1], digest[:16])


def _cut(text: Tensor, starts: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    window = text[starts + torch.arange(positions + 1)].long()
    return window[:, :-1], window[:, 1:]
