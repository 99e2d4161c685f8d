"""Dispatch mode that records every ATen op of a forward pass in a torch.fx graph.

In: a model and a call of its forward. Out: a `torch.fx.GraphModule`.

A tensor is recognized by identity or, if autograd made another tensor object for the same data, by its view of its
storage. An op never receives a parameter, a buffer or another tensor from outside the forward, but its *twin*. The twin
of a parameter is a meta tensor in hybrid mode; in real mode it is a CPU copy, with random values if the parameter is on
meta. The twin of any other tensor is a CPU copy, or a meta tensor if it is on meta or too large to copy.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from quack_fx.graph.capture import answers
from quack_fx.graph.capture.devices import OneDevice
from quack_fx.graph.capture.equal import EqualGroup
from quack_fx.graph.capture.hybrid import NUMBER, READS, REAL_LIMIT, name_of, run_mixed
from quack_fx.graph.capture.isolate import no_autocast
from quack_fx.graph.capture.layers import EqualLayers
from quack_fx.graph.capture.memory import Window, storage_of, window_of, window_on
from quack_fx.graph.forward.fused import AnyLayout
from quack_fx.graph.forward.gpus import OnThisMachine
from quack_fx.graph.forward.jagged import JaggedWrittenOut, takes_itself_apart
from quack_fx.graph.forward.machine import available_memory

LITTLE = 1 << 26
"""Memory that a recording may always use, in bytes."""
VARIANT_ROOM = 1 << 30
"""Memory that a variant may use at most, in bytes: with other weights, a forward may compute much longer sequences."""
_FOREIGN = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[2]))
_MOST = 5
"""Number of innermost frames of the model's own code (neither torch's nor ours) recorded for an op."""


class Recorder(TorchDispatchMode):
    """Records the ops that run while it is active; see the module docstring."""

    # Higher-order ops such as flex_attention reach this mode undecomposed.
    supports_higher_order_operators = True

    def __init__(
        self,
        model: nn.Module,
        way: Literal["hybrid", "real"],
        equal: Sequence[EqualGroup] = (),
        variant: int = 0,
        sources: bool = False,
    ) -> None:
        super().__init__()
        self.graph = Graph()
        self.canned: list[str] = []
        self.way = way
        self.entered = 0
        self.most: int | None = REAL_LIMIT if way == "hybrid" else sys.maxsize
        self.variant = variant
        self._answers = answers.VARIANTS[variant]()
        self.reads = 0
        self._drawn: set[Node] = set()
        self._sources = sources
        room = max(available_memory() // 2, LITTLE)
        self._room = self._left = min(room, VARIANT_ROOM) if variant else room
        self.attributes: dict[str, Tensor] = {}
        self._nodes: dict[int, Node] = {}
        self._windows: dict[Window, Node] = {}
        self._twins: dict[int, torch.UntypedStorage] = {}
        self.alive: list[Any] = []  # an id is unique only while its tensor is alive
        self._stacks: list[dict[str, tuple[str, type]]] = [{}]
        modules = list(model.named_modules())
        parameters = [(_within(path, n), t) for path, m in modules for n, t in m._parameters.items() if t is not None]
        buffers = [(_within(path, n), t) for path, m in modules for n, t in m._buffers.items() if t is not None]
        self.names = {id(m): n for n, m in modules}
        self._own: dict[int, str] = {}
        self._own_windows: dict[Window, str] = {}
        self._own_storages: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in [*parameters, *buffers]:
            self._own.setdefault(id(tensor), name)
            self._own_windows.setdefault(window_of(tensor), name)
            self._own_storages.setdefault(storage_of(tensor), (name, tensor))
        self.names.update(self._own)
        self._parameters = {storage_of(p) for _, p in parameters}
        self.layers = EqualLayers(equal, self)

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Make torch dispatch higher-order ops to this mode, which it does only for infra modes."""
        return True

    # ---- entering and leaving ------------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        with ExitStack() as stack:
            for context in (*self._contexts(), self.layers.watched()):
                stack.enter_context(context)
            self._around = stack.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exc)
        self._around.__exit__(*exc)

    def _contexts(self) -> list[AbstractContextManager[Any]]:
        """Contexts in which the forward runs; each is documented in its own file."""
        if self.way == "real":
            return [OnThisMachine(), JaggedWrittenOut(), OneDevice(self)]
        return [no_autocast(), OnThisMachine(), JaggedWrittenOut(), AnyLayout(), OneDevice(self)]

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        self.entered += 1
        stack, name = self._stacks[-1], self.names.get(id(module))
        self._stacks.append(stack if name is None else {**stack, name: (name, type(module))})

    def _leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if len(self._stacks) > 1:
            self._stacks.pop()

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Copy example inputs to the CPU as placeholders; those on meta are filled with ones, or zeros for integers."""

        placed_before: dict[int, Tensor] = {}

        def as_input(tensor: Tensor) -> Tensor:
            if id(tensor) in self._own:
                return tensor
            if id(tensor) not in placed_before:
                placed_before[id(tensor)] = copy(tensor)
            return placed_before[id(tensor)]

        def copy(tensor: Tensor) -> Tensor:
            value = tensor.detach()
            value = torch.ones(value.shape, dtype=value.dtype) if value.is_meta else value.cpu()
            if not value.is_floating_point() and tensor.is_meta and value.dtype != torch.bool:
                value.zero_()
            value = value.clone() if value.layout != torch.strided or storage_of(value) == storage_of(tensor) else value
            node = self.graph.placeholder(f"input_{len(self._nodes)}")
            self._remember(value, node)
            return value

        placed: tuple[Any, Any] = tree_map_only(Tensor, as_input, (tuple(args), dict(kwargs)))
        return placed

    def finish(self, output: Any) -> GraphModule:
        """Close the graph, with the tensors that the forward returned as its output."""
        leaves: list[Node] = []
        seen: set[int] = set()

        def collect(value: Any) -> None:
            # The output may be any object (a ModelOutput, a dataclass); only its tensors matter.
            if isinstance(value, Tensor):
                leaves.append(self.node(value))
            elif isinstance(value, Mapping):
                for item in value.values():
                    collect(item)
            elif isinstance(value, list | tuple | set):
                for item in value:
                    collect(item)
            elif hasattr(value, "__dict__") and not isinstance(value, nn.Module) and id(value) not in seen:
                seen.add(id(value))
                for item in vars(value).values():
                    collect(item)

        collect(output)
        self.graph.output(tuple(leaves))
        return GraphModule(self.attributes, self.graph, class_name="Recorded")

    # ---- one op --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if takes_itself_apart(types):
            return NotImplemented
        # This mode decides whether a tensor is fake or real; function modes must not change its device.
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        _check_alone(func)
        node_args, node_kwargs = tree_map(self._as_written, (tuple(args), dict(kwargs)))
        run_args, run_kwargs = tree_map_only(Tensor, self.twin, (tuple(args), dict(kwargs)))
        result = run_mixed(
            func,
            run_args,
            run_kwargs,
            taint=self._taint,
            canned=self.canned,
            answers=self._answers,
            most=self.most,
        )
        if isinstance(func, torch._ops.OpOverload) and not func.is_view and not func._schema.is_mutable:
            self._count(result)
        if not _tensors((args, kwargs, result)):  # no computation, for example a profiler marker
            return result
        node = self.graph.call_function(func, node_args, node_kwargs)
        node.meta["nn_module_stack"] = self._stacks[-1]
        self._note_read(func, node)
        if self._sources:
            node.meta["stack_trace"] = _own_lines()
        return self._bind(func, args, kwargs, run_args, run_kwargs, result, node)

    def _note_read(self, func: Any, node: Node) -> None:
        """Note whether a node reads values that depend on random draws or, on real weights, perhaps on those."""
        drawn = any(n in self._drawn for n in node.all_input_nodes)
        if drawn or torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            self._drawn.add(node)
        if (drawn or self.way == "real") and name_of(func) in READS:
            self._count_read()

    def _bind(self, func: Any, args: Any, kwargs: Any, run_args: Any, run_kwargs: Any, result: Any, node: Node) -> Any:
        """Attach the op's results to its node; return them with the model's own tensors in place of twins."""
        given = {
            id(run): own for own, run in zip(_tensors((args, kwargs)), _tensors((run_args, run_kwargs)), strict=True)
        }
        if isinstance(result, Tensor):
            node.meta["val"] = result
            own = given.get(id(result), result)  # an in-place op returns the tensor it was given
            self._remember(own, node)
            return own
        if not isinstance(result, list | tuple):
            node.meta["val"] = result
            return result
        self._take_apart(node, result)
        return result

    def _count(self, result: Any) -> None:
        """Count the bytes of real results, which all stay alive, and raise before memory runs out."""
        for made in result if isinstance(result, list | tuple) else (result,):
            if isinstance(made, Tensor) and not made.is_meta:
                self._left -= made.numel() * made.element_size()
        if self._left < 0:
            raise MemoryError(f"what it computes takes more than the {self._room / 2**30:.1f} GiB that it may use")

    def append(self, target: Callable[..., Any], inputs: Sequence[Node], results: Sequence[Tensor]) -> Node:
        """Append a node that stands for several ops and returns several tensors."""
        node = self.graph.call_function(target, tuple(inputs))
        node.meta["nn_module_stack"] = self._stacks[-1]
        self._take_apart(node, results)
        return node

    def _take_apart(self, node: Node, results: Sequence[Any]) -> None:
        """Append a getitem node for each tensor in the results of `node`."""
        node.meta["val"] = results
        for i, item in enumerate(results):
            if isinstance(item, Tensor):
                part = self.graph.call_function(_getitem, (node, i))
                self._drawn |= {part} if node in self._drawn else set()
                part.meta = {**node.meta, "val": item}
                self._remember(item, part)

    def _as_written(self, value: Any) -> Any:
        """Return an argument as it appears in the graph.

        Replaced by None are subgraphs of higher-order ops (their tensors are arguments too), and random generators and
        TorchScript objects (packed weights, process groups), which have no textual form.
        """
        if isinstance(value, Tensor):
            return self.node(value)
        return None if isinstance(value, torch.Generator | torch.ScriptObject) or _is_code(value) else value

    # ---- tensors and their nodes ---------------------------------------------------------------------------------

    def _remember(self, tensor: Tensor, node: Node) -> None:
        node.meta.setdefault("val", tensor)
        self._nodes[id(tensor)] = node
        self._windows[window_of(tensor)] = node
        self.alive.append(tensor)

    def node(self, tensor: Tensor) -> Node:
        """Return the node of a tensor: that of the op that made it, or a new one for a tensor from outside."""
        node = self._nodes.get(id(tensor)) or self._windows.get(window_of(tensor))
        return node if node is not None else self._outside(tensor)

    def _outside(self, tensor: Tensor) -> Node:
        """Add a node for a tensor that no recorded op made: a parameter, a buffer, a view of one, or a constant."""
        self._make_twin(tensor)
        name = self._own.get(id(tensor)) or self._own_windows.get(window_of(tensor))
        if name is None and (owner := self._own_storages.get(storage_of(tensor))) is not None:
            base = self.node(owner[1])
            window = (list(tensor.shape), list(tensor.stride()), tensor.storage_offset())
            node = self.graph.call_function(torch.ops.aten.as_strided.default, (base, *window))
            node.meta["nn_module_stack"] = self._stacks[-1]
        else:
            name = name if name is not None else f"_constant_{len(self.attributes)}"
            self.attributes.setdefault(name, tensor)
            node = self.graph.create_node("get_attr", name)
            node.meta["nn_module_stack"] = self._stacks[-1]
        node.meta["val"] = self.twin(tensor)
        self._remember(tensor, node)
        return node

    def twin(self, tensor: Tensor) -> Tensor:
        """Return the tensor that an op receives instead of `tensor`; see the module docstring."""
        key, storage = storage_of(tensor), None
        while (twin := self._twins.get(key)) is not None and twin is not storage:
            storage, key = twin, int(twin._cdata)  # the real twin of a buffer may have become fake
        return tensor if storage is None else window_on(storage, tensor)

    def _make_twin(self, tensor: Tensor) -> None:
        """Make the twin storage of a tensor from outside the forward; see the module docstring."""
        key = storage_of(tensor)
        if key in self._twins or tensor.layout != torch.strided:
            return
        original = tensor.untyped_storage()
        if key not in self._parameters:
            small = original.nbytes() <= available_memory() // 4
            storage = original if tensor.is_meta else original.cpu().clone() if small else _fake_storage(original)
        elif self.way == "hybrid":
            storage = original if tensor.is_meta else _fake_storage(original)
        elif tensor.is_meta:
            numbers = torch.randn(original.nbytes() // tensor.element_size()) * 0.02
            storage = numbers.to(tensor.dtype).untyped_storage()
        else:
            storage = _other_values(original.cpu().clone(), tensor.dtype, self.variant)
        self._twins[key] = storage
        self.alive.append(tensor)

    def _taint(self, tensor: Tensor) -> Tensor:
        """Replace the storage of a real tensor that is about to receive fake values by a fake one; return the twin."""
        storage = _fake_storage(tensor.untyped_storage())
        self._twins[storage_of(tensor)] = storage
        self.alive.append(tensor)
        return window_on(storage, tensor)

    def stand_in(self, tensor: Tensor, fake: bool) -> Tensor:
        """Return a tensor with the same graph node: the twin or, if `fake`, a meta tensor."""
        node, twin = self.node(tensor), self.twin(tensor)
        if fake and not twin.is_meta:
            twin = torch.empty_strided(twin.shape, twin.stride(), dtype=twin.dtype, device="meta")
        self._remember(twin, node)
        return twin

    def note_read(self) -> None:
        """Note that Python reads real values without an op."""
        if self.way == "real":
            self._count_read()

    def _count_read(self) -> None:
        """Count a read of computed values. With other weights or draws than the model's own, a loop may never end.

        Raises:
            TooManyReads: There were too many.
        """
        self.reads += 1
        if self.variant and self.reads > answers.MOST_READS:
            raise answers.TooManyReads

    def made_up(self, tensor: Tensor) -> Any:
        """Return made-up values of a fake tensor, nested as `tolist` returns them."""
        self.canned.append(NUMBER)
        return self._answers.values(tensor)


def _getitem(sequence: Sequence[Any], index: int) -> Any:
    """Element of an op's results; a named function, so that generated code can refer to it."""
    return sequence[index]


def _own_lines() -> str:
    """Innermost frames of the model's code, innermost last, in the format of `Node.stack_trace`."""
    frame, found = sys._getframe(1), list[traceback.FrameSummary]()
    while frame.f_back is not None and len(found) < _MOST:
        frame = frame.f_back
        code = frame.f_code
        if not code.co_filename.startswith(_FOREIGN):
            found.append(traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name))
    return "".join(traceback.StackSummary.from_list(found[::-1]).format())


def _fake_storage(like: torch.UntypedStorage) -> torch.UntypedStorage:
    return torch.UntypedStorage(like.nbytes(), device="meta")


def _other_values(storage: torch.UntypedStorage, dtype: torch.dtype, variant: int) -> torch.UntypedStorage:
    """The same values for variant 0; for others, the values backwards, negated or both."""
    values = torch.empty(0, dtype=dtype).set_(storage)
    if not variant or dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return storage
    values = values.flip(0) if variant % 2 else values
    return (-values if variant > 1 else values).untyped_storage()


def _within(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tree)
    return found


def _check_alone(func: Any) -> None:
    """Reject ops that wait for other ranks, which may not be running this forward; and tensors here are fake.

    Raises:
        RuntimeError: The op communicates with other ranks.
    """
    home = getattr(func, "namespace", None)
    if home == "c10d" and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            f"it communicates with other ranks ({func.name()}); find the pairs in one process, before the model is "
            "made parallel"
        )


def _is_code(value: Any) -> bool:
    """Whether a value is a module or a function, and not an op or a class."""
    return callable(value) and not isinstance(value, Node | Tensor | torch._ops.OpOverload | type)
