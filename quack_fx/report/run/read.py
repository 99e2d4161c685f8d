"""JSON lines of a training run -> a `Run`, as far as the file goes.

In: a file that `quack_fx.RunLog` may still be writing. Out: for every step, its numbers and summaries of the heads'
numbers; the heads' numbers themselves for at most a few hundred steps, so that a long run fits in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from quack_fx.errors import RunError

HeadName = tuple[str, str]
"""A site, and a metric of its heads: ("layers.0.attn", "q/norm")."""

MOST_SAMPLES = 400
"""Steps of which the numbers of every head are kept; beyond, every other one is dropped."""

PRODUCT, LOGIT, NORM, SCALE = "qk_norm_product", "max_attn_logit", "norm", "lr_scale"
_OF_BLOCKS = (NORM, SCALE)
_SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {"min": min, "median": median, "max": max}
_CHUNK = 1 << 24


@dataclass
class Record:
    """One recorded step.

    Attributes:
        step: Its number.
        time: When it was recorded, in seconds since 1970; NaN if unknown.
        own: The numbers that the user gave.
        attention: Summaries over all heads of all sites: "max_attn_logit/max", "lr_scale/min" and so on.
    """

    step: int
    time: float
    own: dict[str, float]
    attention: dict[str, float]


@dataclass
class Sample:
    """The numbers of every head at one step."""

    step: int
    heads: dict[HeadName, list[float]]


@dataclass
class Run:
    """A recorded run.

    Attributes:
        records: The steps in order; steps recorded again after a restart replace the old ones.
        samples: The heads' numbers of the first step and of others, evenly spaced.
        last: The heads' numbers at the last step that has them.
        restarts: Steps from which a resumed run went on.
    """

    records: list[Record] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    last: Sample | None = None
    restarts: list[int] = field(default_factory=list)
    _stride: int = 1

    def add(self, record: Record, heads: dict[HeadName, list[float]]) -> None:
        """Add a step. The last step, given again, is merged; an earlier one discards all steps from there on."""
        if self.records and record.step < self.records[-1].step:
            self.restarts.append(record.step)
            self.records = [known for known in self.records if known.step < record.step]
            self.samples = [known for known in self.samples if known.step < record.step]
            self.last = self.samples[-1] if self.samples else None
        if self.records and record.step == self.records[-1].step:
            known = self.records[-1]
            known.time = record.time
            known.own.update(record.own)
            known.attention.update(record.attention)
        else:
            self.records.append(record)
        if heads:
            self._sample(record.step, heads)

    def _sample(self, step: int, heads: dict[HeadName, list[float]]) -> None:
        if self.last is not None and self.last.step == step:
            self.last.heads.update(heads)
            return
        self.last = Sample(step, heads)
        if (len(self.records) - 1) % self._stride == 0 or not self.samples:
            self.samples.append(self.last)
            if len(self.samples) > MOST_SAMPLES:
                del self.samples[1::2]
                self._stride *= 2


class RunFile:
    """A record that may still be written.

    Arguments:
        path: The file; it need not exist yet.

    Attributes:
        run: What was read so far.
        unfinished: Whether the file ends in an incomplete line, which is not read.

    Example:
        >>> file = RunFile(Path("run.jsonl"))
        >>> while file.update():
        ...     print(file.run.records[-1].step)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.run, self.unfinished = Run(), False
        self._offset, self._lines = 0, 0
        self._identity: tuple[int, int] | None = None

    def update(self) -> bool:
        """Read what was added; from the start if the file was replaced or truncated.

        Returns:
            Whether there was something new.

        Raises:
            RunError: The file cannot be read, or a line is not a record.
        """
        try:
            with self.path.open("rb") as file:
                stat = self.path.stat()
                identity = (stat.st_dev, stat.st_ino)
                if stat.st_size < self._offset or self._identity not in (None, identity):
                    self._begin()
                self._identity = identity
                file.seek(self._offset)
                before, rest = self._offset, b""
                while part := file.read(_CHUNK):
                    whole, newline, rest = (rest + part).rpartition(b"\n")
                    if newline:
                        self._take(whole)
                        self._offset += len(whole) + 1
                self.unfinished = bool(rest)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise RunError(f"the record {str(self.path)!r} cannot be read: {error.strerror}") from error
        return self._offset > before

    def _take(self, lines: bytes) -> None:
        for line in lines.split(b"\n"):
            self._lines += 1
            try:
                self.run.add(*_record(json.loads(line)))
            except ValueError as error:
                said = str(error) if isinstance(error, RunError) else f"it is not JSON ({error})"
                raise RunError(
                    f"{str(self.path)!r}, line {self._lines}: {said}; give a file that quack_fx.RunLog wrote"
                ) from error


def read(path: Path) -> RunFile:
    """A record as it is now.

    Raises:
        RunError: There is no such file, a line of it is not a record, or it has no complete line yet.
    """
    file = RunFile(path)
    if not file.update():
        if not path.exists():
            raise RunError(f"there is no record {str(path)!r}; quack_fx.RunLog writes one while a model trains")
        raise RunError(f"the record {str(path)!r} has no whole line yet; try again when a step was recorded")
    return file


def _record(line: object) -> tuple[Record, dict[HeadName, list[float]]]:
    """The step of a line, and the numbers of its heads.

    Raises:
        RunError: The line is not a record of a step.
    """
    step = line.get("step") if isinstance(line, dict) else None
    if not isinstance(line, dict) or isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise RunError("it is no record of a step")
    record = Record(step, math.nan, {}, {})
    heads: dict[HeadName, list[float]] = {}
    summaries: dict[tuple[str, str], list[float]] = {}
    for name, value in line.items():
        name = printable(name)
        if name == "step":
            continue
        if isinstance(value, list):
            if not name.startswith("attention/") or not value:
                raise RunError(f"{name!r} is {_short(value)}, which is no number")
            heads[_head_name(name)] = [_number(name, one) for one in value]
        elif name.startswith("attention/"):
            whole, _, summary = name.rpartition("/")
            if summary in _SUMMARIES:
                summaries.setdefault((whole.rpartition("/")[2], summary), []).append(_number(name, value))
        elif name == "time":
            record.time = _number(name, value)
        else:
            record.own[name] = _number(name, value)
    record.attention = {**_of_summaries(summaries), **_of_heads(heads)}
    return record, heads


def printable(name: str) -> str:
    """A name with its unprintable characters escaped, for a terminal or a page."""
    return name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _number(name: str, value: object) -> float:
    if type(value) in (int, float) or value in ("NaN", "Infinity", "-Infinity"):
        try:
            return float(value)  # type: ignore[arg-type]
        except OverflowError:
            pass
    raise RunError(f"{name!r} is {_short(value)}, which is no number")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _head_name(name: str) -> HeadName:
    """Site and metric of a name in the file; the metric of a block includes the block's name."""
    parts = name.split("/")[1:]
    size = 2 if parts[-1] in _OF_BLOCKS else 1
    return "/".join(parts[:-size]), "/".join(parts[-size:])


def _of_heads(heads: Mapping[HeadName, Sequence[float]]) -> dict[str, float]:
    """Minimum, median and maximum of each metric over all heads of all sites."""
    kinds: dict[str, list[float]] = {}
    for (_, metric), values in heads.items():
        kinds.setdefault(metric.rpartition("/")[2], []).extend(values)
    return {f"{kind}/{name}": summary(name, values) for kind, values in kinds.items() for name in _SUMMARIES}


def _of_summaries(summaries: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, float]:
    """The same from summaries by site; a median over all heads cannot be computed from medians."""
    return {f"{kind}/{name}": summary(name, values) for (kind, name), values in summaries.items() if name != "median"}


def summary(name: str, values: Sequence[float]) -> float:
    """The minimum ("min"), "median" or maximum ("max") of some values; NaN if a value is."""
    return math.nan if any(map(math.isnan, values)) else _SUMMARIES[name](values)
