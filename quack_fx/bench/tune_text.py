"""A language model's loss and batches from plain bytes.

In: a model, the example inputs of its forward, and text. Out: `LanguageModel`: the argument that takes the tokens, the
output with the next-token logits, and batches of text in that form. A model that is not a language model, or that sees
the tokens it predicts, is refused.
"""

from __future__ import annotations

import inspect
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
"""Sequence lengths to try if the user gave no inputs."""

_TEXT_BYTES = 4_000_000
_ONE_IN = 20
"""The last `1 / _ONE_IN` of the text is held out."""

_WAY_OUT = "give --batches FILE.py:FUNCTION, which yields batches for which the model gives its loss"


@dataclass(frozen=True)
class LanguageModel:
    """How a model takes tokens and returns logits.

    Attributes:
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.
        tokens: Index or name of the argument that takes the tokens.
        targets: Name of the argument for the next tokens, if the model returns logits of all positions only with it;
            else None.
        vocabulary: Size of the vocabulary.
        shape: Sequences and positions of a batch.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tokens: int | str
    targets: str | None
    vocabulary: int
    shape: tuple[int, int]

    def loss(self, model: nn.Module, tokens: Tensor, following: Tensor) -> Tensor:
        """Mean next-token loss; `tokens` and the next tokens, `following`, are [sequences, positions]."""
        logits = self.logits(model, tokens, following)
        assert logits is not None
        return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())

    def logits(self, model: nn.Module, tokens: Tensor, following: Tensor) -> Tensor | None:
        """The largest tensor in the model's output that has a vector for every token, if there is one."""
        args = [tokens if i == self.tokens else value for i, value in enumerate(self.args)]
        kwargs = {name: tokens if name == self.tokens else value for name, value in self.kwargs.items()}
        output = model(*args, **kwargs, **({} if self.targets is None else {self.targets: following}))
        leaves = tree_leaves(dict(output) if hasattr(output, "keys") else output)
        parts = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 3]
        return max((part for part in parts if part.shape[:2] == tokens.shape), key=Tensor.numel, default=None)

    def batches(self, text: Tensor, seed: int) -> Iterator[Batch]:
        """Endless random batches of a text."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(text) - self.shape[1], (self.shape[0], 1), generator=generator)
            yield self._cut(text, starts)

    def held_out(self, text: Tensor) -> list[Batch]:
        """Batches of equally spaced sequences of a text."""
        starts = torch.linspace(0, len(text) - self.shape[1] - 1, HELD_OUT * self.shape[0]).long()
        return [self._cut(text, own.unsqueeze(1)) for own in starts.chunk(HELD_OUT)]

    def _cut(self, text: Tensor, starts: Tensor) -> Batch:
        window = text[starts + torch.arange(self.shape[1] + 1)].long() % self.vocabulary
        return (window[:, :-1], window[:, 1:]), {}


def language_model(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], given: bool) -> LanguageModel:
    """Find how a model takes tokens and where it returns the logits of the next tokens.

    Arguments:
        model: The model, with real weights.
        args: Positional arguments with which its forward runs.
        kwargs: Keyword arguments with which its forward runs.
        given: Whether these arguments are the user's; a batch then has their size.

    Returns:
        The arguments and sizes found.

    Raises:
        StepError: The model is not a language model, or sees the tokens that it predicts.
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
    optional = (p.name for p in inspect.signature(model.forward).parameters.values() if p.default is None)
    names: list[str | None] = [None, *(name for name in optional if name not in kwargs)]
    failure = "its output has no logits for every token"
    for shape in sizes:
        for targets in names:
            found = LanguageModel(tuple(args), dict(kwargs), ids[0], targets, 0, (shape[0], shape[1]))
            try:
                vocabulary = _vocabulary(model, found)
            except StepError:
                raise
            except Exception as error:  # raised by the model for an argument or size that it does not accept
                failure = first_line(error) if targets is None else failure
                continue
            if vocabulary is not None:
                return replace(found, vocabulary=vocabulary)
    raise StepError(f"this model predicts no following tokens ({failure}); {_WAY_OUT}")


@torch.no_grad()
def _vocabulary(model: nn.Module, found: LanguageModel) -> int | None:
    """Size of the vocabulary, from the logits; None if there are no logits, or if they depend on the targets."""
    rows = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    most = max(2, min(rows, default=2))
    tokens, following = torch.randint(most, (2, *found.shape), generator=torch.Generator().manual_seed(0))
    later = torch.cat((tokens[:, :-1], (tokens[:, -1:] + 1) % most), dim=1)
    training = model.training
    model.eval()
    try:
        logits, by_targets, by_later = (
            found.logits(model, ids, targets)
            for ids, targets in ((tokens, following), (tokens, following.flip(1)), (later, following))
        )
    finally:
        model.train(training)
    if logits is None or by_targets is None or by_later is None:
        return None
    if logits.shape[-1] not in rows or not torch.equal(logits, by_targets):
        return None
    if not torch.allclose(logits[:, :-1], by_later[:, :-1], rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
        raise StepError(f"this model sees the tokens that it would be asked for; {_WAY_OUT}")
    return logits.shape[-1]


def text_of(path: Path | None, positions: int) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and held-out bytes.

    Arguments:
        path: A file; None for the sources of Python's standard library.
        positions: Sequence length.

    Raises:
        StepError: The file cannot be read or is too short.
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
