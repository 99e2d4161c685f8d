"""A language model's loss and batches out of plain bytes.

In: a model, the example inputs of its forward, and text. Out: `LanguageModel`: which argument holds the tokens, where
the model says what follows each of them, and batches of text in that form. A model that is none, or that sees the
tokens it is asked for, is refused.
"""

from __future__ import annotations

import inspect
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quack_fx.bench.tune import HELD_OUT, Batch
from quack_fx.errors import StepError, first_line

_SEQUENCES = 8
_POSITIONS = (64, 32, 16, 8)
"""Positions of a sequence that are tried, where the user gave no inputs."""

_TEXT_BYTES = 4_000_000
_ONE_IN = 20
"""One in so many bytes, at the end of the text, is held out."""

_WAY_OUT = "give --batches FILE.py:FUNCTION, which yields batches for which the model gives its loss"


@dataclass(frozen=True)
class LanguageModel:
    """Where a model takes tokens and gives logits.

    Attributes:
        args: Positional arguments of the forward.
        kwargs: Named ones.
        tokens: Index or name of the argument that holds the tokens.
        targets: Name of the argument that the model wants the following tokens in to give logits for all; None where it
            gives them anyway.
        vocabulary: Number of different tokens.
        shape: Sequences and positions of a batch.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tokens: int | str
    targets: str | None
    vocabulary: int
    shape: tuple[int, int]

    def loss(self, model: nn.Module, tokens: Tensor, following: Tensor) -> Tensor:
        """Mean loss of the tokens that follow; tokens and following are [sequences, positions]."""
        logits = _logits(model(*self.args_with(tokens), **self.kwargs_with(tokens, following)), tokens)
        assert logits is not None
        return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())

    def args_with(self, tokens: Tensor) -> tuple[Any, ...]:
        """The positional arguments for some tokens."""
        return tuple(tokens if i == self.tokens else value for i, value in enumerate(self.args))

    def kwargs_with(self, tokens: Tensor, following: Tensor) -> dict[str, Any]:
        """The named arguments for some tokens, and those that follow."""
        own = {name: tokens if name == self.tokens else value for name, value in self.kwargs.items()}
        return own if self.targets is None else {**own, self.targets: following}

    def batches(self, text: Tensor, seed: int) -> Iterator[Batch]:
        """Random pieces of a text, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(text) - self.shape[1], (self.shape[0], 1), generator=generator)
            yield self._cut(text, starts)

    def held_out(self, text: Tensor) -> list[Batch]:
        """Pieces of a text at equal distances."""
        starts = torch.linspace(0, len(text) - self.shape[1] - 1, HELD_OUT * self.shape[0]).long()
        return [self._cut(text, own.unsqueeze(1)) for own in starts.chunk(HELD_OUT)]

    def _cut(self, text: Tensor, starts: Tensor) -> Batch:
        window = text[starts + torch.arange(self.shape[1] + 1)].long() % self.vocabulary
        return (window[:, :-1], window[:, 1:]), {}


def language_model(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], given: bool) -> LanguageModel:
    """Look how a model takes tokens and where it gives logits for those that follow.

    Arguments:
        model: The model, with numbers.
        args: Positional arguments of a forward for which it runs.
        kwargs: Named ones.
        given: Whether the user gave them, so that a batch has their size.

    Returns:
        What was found.

    Raises:
        StepError: It is no language model, or one that sees the tokens that it is asked for.
    """
    named: dict[int | str, Any] = dict(enumerate(args))
    named.update(kwargs)
    tensors = [name for name, value in named.items() if isinstance(value, Tensor)]
    ids = [name for name in tensors if named[name].dim() == 2 and named[name].dtype in (torch.int64, torch.int32)]
    if len(ids) != 1 or len(tensors) != 1:
        raise StepError(
            f"text can be put into a model with one tensor of token ids, and this one takes {len(tensors)} tensors, "
            f"{len(ids)} of them such; {_WAY_OUT}"
        )
    sizes = [tuple(named[ids[0]].shape)] if given else [(_SEQUENCES, positions) for positions in _POSITIONS]
    names: list[str | None] = [None, *_optional(model, kwargs)]
    failure = "its output has no logits for every token"
    for shape in sizes:
        for targets in names:
            found = LanguageModel(tuple(args), dict(kwargs), ids[0], targets, 0, (shape[0], shape[1]))
            try:
                vocabulary = _vocabulary(model, found)
            except StepError:
                raise
            except Exception as error:  # a model's own, for an argument or a size that it does not take
                failure = first_line(error) if targets is None else failure
                continue
            if vocabulary is not None:
                return LanguageModel(tuple(args), dict(kwargs), ids[0], targets, vocabulary, (shape[0], shape[1]))
    raise StepError(f"this model predicts no following tokens ({failure}); {_WAY_OUT}")


def _optional(model: nn.Module, kwargs: Mapping[str, Any]) -> list[str]:
    """Arguments of the forward that may be left out, and were."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is None and p.name not in kwargs]


@torch.no_grad()
def _vocabulary(model: nn.Module, found: LanguageModel) -> int | None:
    """Number of different tokens, as its logits tell; None where there are none, or its targets change them.

    Raises:
        StepError: The logits of a token depend on later ones.
    """
    rows = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    most = max(2, min(rows, default=2))
    tokens, following = torch.randint(most, (2, *found.shape), generator=torch.Generator().manual_seed(0))
    later = torch.cat((tokens[:, :-1], (tokens[:, -1:] + 1) % most), dim=1)
    training = model.training
    model.eval()
    try:
        logits, by_targets, by_later = (
            _logits(model(*found.args_with(ids), **found.kwargs_with(ids, targets)), tokens)
            for ids, targets in ((tokens, following), (tokens, following.flip(1)), (later, following))
        )
    finally:
        model.train(training)
    if logits is None or by_targets is None or by_later is None or logits.shape[-1] not in rows:
        return None
    if not torch.equal(logits, by_targets):
        return None
    if not torch.allclose(logits[:, :-1], by_later[:, :-1], rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
        raise StepError(f"this model sees the tokens that it would be asked for; {_WAY_OUT}")
    return logits.shape[-1]


def _logits(output: Any, tokens: Tensor) -> Tensor | None:
    """The largest part of an output with a vector for every token."""
    leaves = tree_leaves(dict(output) if hasattr(output, "keys") else output)
    parts = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 3]
    return max((part for part in parts if part.shape[:2] == tokens.shape), key=Tensor.numel, default=None)


def text_of(path: Path | None, positions: int) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and others to measure with.

    Arguments:
        path: A file; None for the sources of Python's standard library.
        positions: Positions of a sequence.

    Raises:
        StepError: The file cannot be read, or is too short.
    """
    try:
        if path is None:
            files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
            data = b"\n".join(file.read_bytes() for file in files)[:_TEXT_BYTES]
        else:
            data = path.read_bytes()
    except OSError as error:
        raise StepError(f"--data {str(path)!r} cannot be read: {error.strerror}") from error
    held_out = len(data) // _ONE_IN
    if held_out < positions + 2:
        what = "Python's standard library has no sources here" if path is None else f"--data {str(path)!r} is too short"
        raise StepError(
            f"{what}: {len(data):,} bytes, and {_ONE_IN * (positions + 2):,} are needed; give a longer file"
        )
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return text[:-held_out], text[-held_out:]
