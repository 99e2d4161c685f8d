"""What a forward pass on real numbers did, as far as attention logits are concerned.

In: a model and its inputs. Out: a `Recording` of every softmax and every matrix product that ran, each with its edges
in the autograd graph, the modules that were running, and for each operand whether the model's inputs reach it ("data")
or parameters alone do ("weight").

Nothing here asks for a module's class or name: products are ATen ops, seen by a TorchDispatchMode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode  # private, but the documented way to watch ATen ops
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

PRODUCTS: dict[Any, tuple[int, int, int | None]] = {
    aten.mm: (0, 1, None),
    aten.bmm: (0, 1, None),
    aten.mv: (0, 1, None),
    aten.addmm: (1, 2, 0),
    aten.addmv: (1, 2, 0),
    aten.baddbmm: (1, 2, 0),
    aten.convolution: (0, 1, 2),
    aten.linear: (0, 1, 2),
    aten.matmul: (0, 1, None),
}
"""Where an op keeps its two factors and what it adds to their product."""

SOFTMAXES = (aten._softmax, aten._safe_softmax)


@dataclass(eq=False)
class Product:
    """One matrix product of the forward pass.

    Attributes:
        func: The ATen op.
        args: Its arguments, tensors detached.
        factors: Positions of the two factors in `args`.
        added: Position of the summand, or None.
        edges: Gradient edges of the arguments, by position; None where no gradient flows.
        data: For each factor, whether the model's inputs reach it.
        modules: Names of the modules that were running, outermost first.
        node: The autograd node that the op made; None when it made none.
    """

    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    factors: tuple[int, int]
    added: int | None
    edges: dict[int, GradientEdge | None]
    data: tuple[bool, bool]
    modules: tuple[str, ...]
    node: Node | None = None

    def replay(self, gradient: Tensor) -> dict[int, Tensor]:
        """Gradients of the op's own arguments, by position, given the gradient of its result.

        The op runs again on detached arguments, so nothing flows past this one use of a weight, however often the
        model uses it elsewhere.
        """
        args = list(self.args)
        places = [i for i in (*self.factors, self.added) if i is not None and _floating(args[i])]
        for place in places:
            args[place] = args[place].detach().requires_grad_()
        with torch.enable_grad():
            result = self.func(*args, **self.kwargs)
        return dict(zip(places, torch.autograd.grad(result, [args[i] for i in places], gradient), strict=True))


@dataclass(eq=False)
class Softmax:
    """One softmax of the forward pass: the edge of its input, its shape and axis, the modules that were running."""

    logits: GradientEdge
    shape: tuple[int, ...]
    dim: int
    modules: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    node: Node | None = None


@dataclass
class Recording:
    """Everything of one forward pass that the proof needs.

    Attributes:
        products: All matrix products, in the order in which they ran.
        softmaxes: All softmaxes whose input carries a gradient.
        ran: Names of the modules whose forward was called through hooks.
        roots: Autograd nodes of the model's outputs.
    """

    products: list[Product] = field(default_factory=list)
    softmaxes: list[Softmax] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)
    roots: list[Node] = field(default_factory=list)


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Recording:
    """Run the model once, with gradients, and record it.

    Fused attention is switched to its written-out form, in which the logits are a tensor like any other.

    Arguments:
        model: A model on real tensors whose parameters require gradients.
        args: Positional inputs.
        kwargs: Keyword inputs.

    Returns:
        What ran.
    """
    watch = _Watch(model.parameters())
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_module_stack(model, watch))
        for tensor in tree_leaves((args, dict(kwargs))):
            watch.mark_data(tensor)
        with watch:
            output = model(*args, **kwargs)
    watch.settle()
    recording = watch.recording
    recording.roots = [t.grad_fn for t in _tensors_in(output) if t.grad_fn is not None]
    return recording


class _Watch(TorchDispatchMode):
    """Records products and softmaxes; follows by storage what the model's inputs reach."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        # Made beforehand: below autograd, where the ops are seen, a leaf cannot be asked for its edge.
        self._leaves = {id(p): get_gradient_edge(p) for p in parameters if p.requires_grad}
        self.modules: list[str] = []
        self._data: dict[int, Tensor] = {}  # storage address -> a tensor that keeps it from being reused
        self._unsettled: list[tuple[Product | Softmax, Tensor]] = []

    def mark_data(self, value: Any) -> None:
        """Note that the inputs reach this tensor's storage."""
        if isinstance(value, Tensor) and value.numel():
            self._data[value.untyped_storage().data_ptr()] = value

    def is_data(self, value: Any) -> bool:
        """Whether the inputs reach this tensor."""
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._data

    def settle(self) -> None:
        """Fetch the autograd nodes of the last ops; autograd attaches them only after the op has returned here."""
        for entry, out in self._unsettled:
            entry.node = out.grad_fn
        self._unsettled.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Before an op may work in place on the last result and so replace its node.
        self.settle()
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if not _reads_shape_only(packet.__name__) and any(map(self.is_data, tree_leaves((args, kwargs)))):
            for tensor in tree_leaves(result):
                self.mark_data(tensor)
        if packet in PRODUCTS:
            self._product(func, args, kwargs, result, PRODUCTS[packet])
        elif packet in SOFTMAXES and (edge := self._edge(args[0])) is not None:
            logits = args[0]
            softmax = Softmax(
                edge, tuple(logits.shape), args[1] % logits.ndim, tuple(self.modules), logits.device, logits.dtype
            )
            self.recording.softmaxes.append(softmax)
            self._unsettled.append((softmax, result))
        return result

    def _edge(self, tensor: Tensor) -> GradientEdge | None:
        if tensor.grad_fn is None:
            return self._leaves.get(id(tensor))
        return GradientEdge(tensor.grad_fn, tensor.output_nr)

    def _product(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor, places: tuple[int, int, int | None]
    ) -> None:
        left, right, added = places
        added = added if added is not None and added < len(args) and isinstance(args[added], Tensor) else None
        product = Product(
            func=func,
            args=tuple(a.detach() if isinstance(a, Tensor) else a for a in args),
            kwargs=kwargs,
            factors=(left, right),
            added=added,
            edges={i: self._edge(args[i]) for i in (left, right, added) if i is not None},
            data=(self.is_data(args[left]), self.is_data(args[right])),
            modules=tuple(self.modules),
        )
        self.recording.products.append(product)
        self._unsettled.append((product, out))


@contextmanager
def _module_stack(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Keep the names of the running modules on `watch.modules`."""

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(*_: Any) -> None:
            watch.modules.append(name)
            watch.recording.ran.add(name)

        def leave(*_: Any) -> None:
            watch.modules.pop()

        return enter, leave

    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter, leave = hooks(name)
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def _reads_shape_only(op: str) -> bool:
    """Whether an op takes nothing but shape, dtype and device from its tensor."""
    return op.startswith("new_") or op.endswith("_like")


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of an output: nested containers, and the attributes of objects that pytree does not know."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors_in(list(leaf.values()))
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            yield from (t for t in vars(leaf).values() if isinstance(t, Tensor))
