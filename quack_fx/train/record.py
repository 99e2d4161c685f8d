"""Records a training run as JSON lines and, optionally, for TensorBoard.

In: a step number, the user's own numbers, and the result of `metrics(heads=True)`. Out: one line of JSON per step,
which `quack-fx report` and `quack-fx watch` read:

    {"step": 20, "time": 1767225600.0, "loss": 3.1, "attention/layers.0.attn/q/norm": [1.9, 2.2], ...}

A per-head metric is stored as a list over the heads, under its name without "/head_3". Its minimum, median and maximum
are left out because they follow from the list. JSON has no NaN or infinity; they are stored as the strings "NaN",
"Infinity" and "-Infinity", which `float` parses.
"""

from __future__ import annotations

import json
import math
import operator
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Self

import torch.distributed as dist
from torch import Tensor

from quack_fx.errors import RunError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

OWN_NAMES = ("step", "time")
OWN_PREFIX = "attention/"
_CHUNK = 1 << 20


class HasMetrics(Protocol):
    """An object with attention metrics: a `QuacK` or the step of `compile_train_step`."""

    def metrics(self, heads: bool = False) -> dict[str, float]:
        """A dict from names to numbers; see `QuacK.metrics`."""
        ...


class RunLog:
    """Records a training run in a file of JSON lines, which `quack-fx report` and `quack-fx watch` show.

    An existing file is appended to, so a resumed run continues in the same file: when an earlier step follows, readers
    discard the records from that step on. An incomplete last line, left by a killed process, is removed.

    With torch.distributed, every rank must create a `RunLog` and call `log`, because all ranks compute the metrics of
    sharded weights together; only rank 0 writes. With pipeline parallelism it therefore records only its own stage.

    Arguments:
        path: The file; its folder must exist.
        quack: The source of metrics: a `QuacK`, or the step of `compile_train_step`. With None, only your own numbers
            are recorded, for example in a baseline run without QuacK.
        tensorboard: Folder for TensorBoard event files with the same numbers (for attention, minimum, median and
            maximum over heads); needs the package tensorboard.

    Raises:
        RunError: `path` is a folder, cannot be written, or is not a recorded run; tensorboard is not installed.

    Example:
        >>> run = quack_fx.RunLog("run.jsonl", quack)
        >>> for step, batch in enumerate(batches):
        ...     loss = train_step(batch)
        ...     if step % 10 == 0:
        ...         run.log(step, loss=loss, lr=scheduler.get_last_lr()[0])
    """

    def __init__(
        self, path: str | os.PathLike[str], quack: HasMetrics | None = None, *, tensorboard: str | None = None
    ) -> None:
        if quack is not None and not callable(getattr(quack, "metrics", None)):
            raise RunError(
                f"quack is a {type(quack).__name__}, which has no metrics; give the QuacK of your optimizer or the "
                "step of compile_train_step"
            )
        self.path = Path(path)
        self._quack = quack
        self._writes = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        self._board: SummaryWriter | None = None
        if self._writes:
            _prepare(self.path)
            if tensorboard is not None:
                self._board = _board(tensorboard)

    def log(self, step: int, /, **numbers: float | Tensor) -> None:
        """Record one step: your own numbers, and the attention metrics for the current weights.

        Waits for the device; call it every 10 or 100 steps if speed matters. Logging a step twice adds to it.

        Arguments:
            step: The step number, 0 or more.
            numbers: Your own numbers by name, such as `loss` and `lr`: floats, ints, or tensors with one element.

        Raises:
            RunError: `step` is not such a number; a name is reserved; a value is not a number; the file cannot be
                written.

        Example:
            >>> run.log(120, loss=loss, lr=3e-4, **{"val/loss": 3.2})
        """
        step = _step(step)
        own = {name: _number(name, value) for name, value in numbers.items()}
        metrics = {} if self._quack is None else self._quack.metrics(heads=True)
        if not self._writes:
            return
        record = {"step": step, "time": time.time(), **own, **_by_head(metrics)}
        line = json.dumps({name: _as_json(value) for name, value in record.items()}, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        if self._board is not None:
            for name, value in {**own, **metrics}.items():
                if "/head_" not in name:
                    self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        """Close the TensorBoard files. The JSON lines are complete after every `log`."""
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _prepare(path: Path) -> None:
    """Create the file, or truncate it after its last complete line."""
    try:
        with path.open("a+b") as file:
            file.seek(0)
            first = file.readline(_CHUNK)  # enough to recognise a record; a device file may be endless
            if first and not _is_record(first):
                raise RunError(f"{str(path)!r} exists and is not a recorded run; give another file")
            file.truncate(_end_of_lines(file))
    except RunError:
        raise
    except (OSError, ValueError) as error:  # a ValueError if it is not a valid path
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError | ValueError) -> RunError:
    return RunError(f"the record {str(path)!r} cannot be written: {getattr(error, 'strerror', error)}")


def _is_record(line: bytes) -> bool:
    """Whether the first line of a file is a record or the beginning of one."""
    if not line.endswith(b"\n"):
        start = b'{"step": '
        return line.startswith(start) or start.startswith(line)
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "step" in record


def _end_of_lines(file: BinaryIO) -> int:
    """Offset of the end of the last complete line of a file, which is read from its end."""
    start = file.seek(0, os.SEEK_END)
    while start:
        end, start = start, max(0, start - _CHUNK)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
    return 0


def _board(folder: str) -> SummaryWriter:
    """A writer of TensorBoard files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError(f"tensorboard={folder!r} needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(folder)


def _step(step: object) -> int:
    """The step number as a Python int."""
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise RunError(f"step {step!r} is not a whole number of 0 or more; give the number of the step first")
    return number


def _number(name: str, value: object) -> float:
    """A number from the user as a float."""
    if name in OWN_NAMES or name.startswith(OWN_PREFIX):
        raise RunError(f"the name {name!r} is taken by the record itself; call your number something else")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise RunError(f"{name} is a tensor of shape {list(value.shape)}; give one number, such as {name}.mean()")
    if isinstance(value, str | bytes) or value is None:
        raise RunError(f"{name} is {value!r}; give a number")
    try:
        return float(value.item() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RunError(f"{name} is a {type(value).__name__}, which is no number; give a float") from error


def _by_head(metrics: Mapping[str, float]) -> dict[str, float | list[float]]:
    """Metrics with the values of all heads in one list, without the summaries that follow from it."""
    lists: dict[str, list[float]] = {}
    for name, value in metrics.items():
        start, mark, _ = name.rpartition("/head_")
        if mark:
            lists.setdefault(start, []).append(value)
    plain = {n: v for n, v in metrics.items() if "/head_" not in n and n.rpartition("/")[0] not in lists}
    return {**plain, **lists}


def _as_json(value: Any) -> Any:
    """A value with NaN and infinities as strings."""
    if isinstance(value, list):
        return [_as_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
