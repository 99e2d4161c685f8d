"""USER: proof of a layout by gradients on real numbers.

In: a model, a layout, example inputs. Out: a `VerifyReport`, or `VerifyError` for the first claim that is wrong.

The proof shares nothing with the finders but the layout. A copy of the model runs once on random weights; `watch.py`
notes every matrix product and softmax. Behind each softmax stands a product of queries and keys. A seed on one head's
part of the query operand must give a gradient to exactly the claimed query rows, and one on the key operand to exactly
the claimed key rows (`heads.py`, `chains.py`); `compare.py` holds the two against each other. What cannot be decided,
because the logits are made inside a fused kernel, say, is listed as not proved and never passes silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quack_fx.errors import VerifyError
from quack_fx.factors import check_layout
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.verify.chains import Chains
from quack_fx.verify.compare import CannotTell, SiteCheck
from quack_fx.verify.watch import Recording, Softmax, record

__all__ = ["NotProved", "SiteProof", "VerifyReport", "verify_qk_pairs"]

SIZE_LIMIT = 500_000_000
"""Parameters of a model that is still copied and run."""


@dataclass(frozen=True, slots=True)
class SiteProof:
    """A site whose claims hold.

    Attributes:
        name: Name of the site.
        heads: Number of query heads, each checked on both sides.
        attentions: Number of softmaxes on which the claims were checked; more than one for a shared layer.
        checks: Number of comparisons made.
    """

    name: str
    heads: int
    attentions: int
    checks: int


@dataclass(frozen=True, slots=True)
class NotProved:
    """A site about which the gradients say neither yes nor no, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was proved about a layout, and what was not.

    Attributes:
        proved: Sites whose rows, heads and terms were all confirmed.
        not_proved: Sites that could not be decided, each with its reason.
    """

    proved: tuple[SiteProof, ...]
    not_proved: tuple[NotProved, ...]

    @property
    def complete(self) -> bool:
        """Whether every site was proved."""
        return not self.not_proved

    @property
    def checks(self) -> int:
        """Number of comparisons that held."""
        return sum(proof.checks for proof in self.proved)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def verify_qk_pairs(model: nn.Module, layout: QKLayout, *args: Any, **kwargs: Any) -> VerifyReport:
    """Prove a layout by gradients: each head's logits depend on exactly the rows that the layout claims.

    A copy of the model runs once, in evaluation mode and on random weights, so zero-initialised or trained weights
    hide nothing; the model itself is left as it is. A model on meta is filled with random numbers when it is small.

    Arguments:
        model: Model the layout belongs to.
        layout: Claims to check, from `find_qk_pairs` or from JSON.
        *args: Inputs of the model's forward, real tensors; a few positions and two sequences are enough.
        **kwargs: The same by keyword.

    Returns:
        The sites that were proved and those that could not be, with reasons. Look at `complete`.

    Raises:
        LayoutError: The layout does not fit the model.
        VerifyError: A claim is wrong (the message names site, head, side, parameter and rows), or the model is too
            large or cannot be run.

    Example:
        >>> import torch
        >>> from quack_fx.layout import AttentionSite, LogitTerm, WeightBlock
        >>> model = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        >>> def rows(start):
        ...     return tuple(((start + 4 * h, start + 4 * h + 4),) for h in range(2))
        >>> query = WeightBlock("in_proj_weight", "q", 0, rows(0), "in_proj_bias")
        >>> key = WeightBlock("in_proj_weight", "k", 0, rows(8), "in_proj_bias")
        >>> site = AttentionSite("", "mha", False, 1, 2, 2, 4, (0, 1), (query,), (key,), (LogitTerm((0,), (0,)),))
        >>> x = torch.randn(2, 5, 8)
        >>> verify_qk_pairs(model, QKLayout((site,)), x, x, x).complete
        True
    """
    model = _bare(model, layout)
    with _alone():
        return _prove(model, layout, args, kwargs)


def _prove(model: nn.Module, layout: QKLayout, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> VerifyReport:
    """Run a copy of the model and check every site."""
    generator = torch.Generator().manual_seed(0)
    copy = _random_copy(model, generator)
    args, kwargs = tree_map(_as_float32, (args, dict(kwargs)))
    try:
        recording = record(copy, args, kwargs)
    except Exception as error:
        raise VerifyError(
            f"the forward of {type(model).__name__} fails on random weights: {_first_line(error)}; "
            "give the inputs that find_qk_pairs was given"
        ) from error
    chains = Chains(copy, recording)
    owners = _softmaxes_of(layout, recording, chains)
    _check_complete(layout, recording, chains, owners)
    proved: list[SiteProof] = []
    open_sites: list[NotProved] = []
    for site, softmaxes in owners.items():
        try:
            proved.append(_check(copy, chains, site, softmaxes, generator))
        except CannotTell as reason:
            open_sites.append(NotProved(site.name, str(reason)))
    return VerifyReport(tuple(proved), tuple(open_sites))


def _check(
    model: nn.Module, chains: Chains, site: AttentionSite, softmaxes: Sequence[Softmax], generator: torch.Generator
) -> SiteProof:
    """Check a site on every softmax that is its own."""
    if not softmaxes:
        raise CannotTell(
            "no softmax ran for it where gradients can be followed (a fused kernel, or no gradient at all)"
        )
    attention = chains.attention_nodes(softmaxes)
    checks = sum(SiteCheck(model, chains, site, softmax, attention, generator).run() for softmax in softmaxes)
    return SiteProof(site.name, site.query_heads, len(softmaxes), checks)


def _softmaxes_of(layout: QKLayout, recording: Recording, chains: Chains) -> dict[AttentionSite, list[Softmax]]:
    """The attentions on which each site's claims are checked.

    An attention belongs to the site that names the innermost running module. Where several sites share a name, none
    names a running module (tied layers) or a site's module never ran through hooks, it belongs to the sites that claim
    a parameter behind its logits.
    """
    names = {site.name for site in layout.sites}
    found: dict[AttentionSite, list[Softmax]] = {site: [] for site in layout.sites}
    for softmax in recording.softmaxes:
        if not chains.logit_products(softmax):
            continue
        inside = next((name for name in reversed(softmax.modules) if name in names), None)
        behind = chains.params_behind(softmax)
        for site in layout.sites:
            claims = {block.param for _, block in site.blocks()} & behind
            if site.name == inside:
                alone = sum(s.name == site.name for s in layout.sites) == 1
                if claims or (alone and chains.is_attention(softmax)):
                    found[site].append(softmax)
            elif claims and (inside is None or site.name not in recording.ran):
                found[site].append(softmax)
    return found


def _check_complete(
    layout: QKLayout, recording: Recording, chains: Chains, owners: Mapping[AttentionSite, Sequence[Softmax]]
) -> None:
    """Refuse a layout that is silent about an attention of the model."""
    known = {softmax for softmaxes in owners.values() for softmax in softmaxes}
    for softmax in recording.softmaxes:
        told = any(entry.name in softmax.modules for entry in layout.skipped)
        if softmax not in known and not told and chains.is_attention(softmax):
            where = softmax.modules[-1] if softmax.modules else ""
            raise VerifyError(
                f"an attention runs in module {where!r}, but the layout has no site for it and skips none"
            )


def _bare(model: nn.Module, layout: QKLayout) -> nn.Module:
    """The model without the wrappers around it, checked to have the layout's parameters under the layout's names."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    check_layout(layout, model)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for site in layout.sites:
        for _, block in site.blocks():
            if block.param not in names:
                raise VerifyError(
                    f"site {site.name!r} names {block.param!r} as a wrapper does; find the pairs on the model itself"
                )
    return model


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _random_copy(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in evaluation mode, on real float32 tensors, with random weights that all require gradients."""
    total = sum(p.numel() for p in model.parameters())
    if total > SIZE_LIMIT:
        raise VerifyError(
            f"{type(model).__name__} has {total:,} parameters, a proof copies at most {SIZE_LIMIT:,}; "
            "verify the same architecture with fewer layers and a smaller width"
        )
    try:
        copy = deepcopy(model).eval()
    except Exception as error:
        raise VerifyError(f"{type(model).__name__} cannot be copied: {_first_line(error)}") from error
    if any(t.is_meta for t in (*copy.parameters(), *copy.buffers())):
        copy = copy.to_empty(device="cpu")
        for buffer in copy.buffers():
            buffer.copy_(_plausible(buffer, generator))
    copy = copy.to(torch.float32)
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.is_floating_point():
                parameter.copy_(_random(parameter, generator))
                parameter.requires_grad_()
    return copy


def _random(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Weights of a size that keeps activations near one; gains, biases and scalars between 0.5 and 1.5."""
    if parameter.ndim < 2:
        return torch.rand(parameter.shape, generator=generator) + 0.5
    return torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])


def _plausible(buffer: Tensor, generator: torch.Generator) -> Tensor:
    """Contents for a buffer whose values were never made: positive numbers, index 0, a mask that hides nothing."""
    if buffer.is_floating_point():
        return torch.rand(buffer.shape, generator=generator) + 0.5
    return torch.full(buffer.shape, buffer.dtype == torch.bool, dtype=buffer.dtype)


def _as_float32(value: Any) -> Any:
    """Inputs in the copy's precision."""
    if isinstance(value, Tensor) and value.is_meta:
        raise VerifyError("an example input is on meta; a proof on real numbers needs real inputs")
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float32)
    return value


@contextmanager
def _alone() -> Iterator[None]:
    """Leave the process's random state and threads as they were."""
    threads = torch.get_num_threads()
    # A proof is hundreds of tiny backward passes, which waking a second thread makes slower.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        torch.set_num_threads(threads)
