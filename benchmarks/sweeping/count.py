"""Counts the attentions that run in a forward, independently of the finders.

In: a model and inputs. Out: the number of attentions that ran directly in each module. An attention is a call of
`scaled_dot_product_attention`, or a product of two computed tensors, followed by a softmax, followed by another such
product. Weights and tensors derived from weights only are not computed tensors. The forward runs eagerly.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

_PRODUCTS = {torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, torch.mm, torch.addmm}
_PRODUCTS |= {Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm, Tensor.mm, Tensor.__rmatmul__}
_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax, torch._softmax}
_PLAIN = {"add", "sub", "mul", "div", "where", "masked_fill", "view", "reshape", "transpose", "permute", "unsqueeze"}
_PLAIN |= {"squeeze", "expand", "float", "to", "type_as", "dropout", "contiguous", "clone", "flatten", "unflatten"}
_PLAIN |= set("clamp tanh getitem cat slice split chunk softcap truediv half type mT T bfloat16 double view_as".split())
_PLAIN |= set("swapaxes movedim neg nan_to_num baddbmm relu max amax".split())


def attentions(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Counter[str]:
    """Count the attentions that run, by innermost module; the root is "".

    Arguments:
        model: The model, with real weights.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.

    Returns:
        Number of attentions in each module that has any.
    """
    names = {id(module): name for name, module in model.named_modules()}
    stack = [""]
    hooks = [
        register_module_forward_pre_hook(lambda module, _: stack.append(names.get(id(module), stack[-1]))),
        # The hook returns None, because any other value would replace the module's output.
        register_module_forward_hook(lambda *_: (stack.pop(), None)[1], always_call=True),
    ]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), _Watch({id(p) for p in model.parameters()}, stack) as watch:
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for hook in hooks:
            hook.remove()
    return watch.found


def chooses(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether every softmax in a forward has more than one input; with a single input, it is constant."""
    with torch.no_grad(), _Sizes() as watch:
        model(*args, **kwargs)
    return watch.smallest > 1


class _Sizes(TorchFunctionMode):
    """Records the smallest dimension that a softmax runs over."""

    def __init__(self) -> None:
        super().__init__()
        self.smallest = 1 << 30

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) > 1:
            self.smallest = min(self.smallest, args[1].shape[-2])
        elif func in _SOFTMAX and args:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            self.smallest = min(self.smallest, args[0].shape[-1 if dim is None else dim])
        return func(*args, **kwargs)


def first_names(model: nn.Module) -> dict[str, str]:
    """Map each module's name to the name of the first module with the same weights, or to itself without weights."""
    first: dict[tuple[int, ...], str] = {}
    names = {}
    for name, module in model.named_modules():
        weights = tuple(id(p) for p in module.parameters())
        names[name] = first.setdefault(weights, name) if weights else name
    return names


class _Watch(TorchFunctionMode):
    """Follows matrix products through a softmax into other matrix products."""

    def __init__(self, weights: set[int], stack: list[str]) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._stack = stack
        self._weights = set(weights)
        self._logits: set[int] = set()
        self._shares: dict[int, str] = {}
        self._counted: set[int] = set()
        self._alive: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_").removeprefix("i").removeprefix("r")
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        made = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward) or "flex_attention" in name:
            # Queries or keys that are a parameter do not count, as in the other branch.
            self.found[self._stack[-1]] += all(id(x) not in self._weights for x in given[:2])
        elif func in _PRODUCTS and all(id(x) not in self._weights for x in given):
            for x in given:
                if (home := self._shares.get(id(x))) is not None and id(x) not in self._counted:
                    self.found[home] += 1
                    self._counted |= {key for key, value in self._shares.items() if value is home}
            self._logits.update(self._kept(made))
        elif func in _SOFTMAX:
            if any(id(x) in self._logits for x in given):
                home = str.__add__(self._stack[-1], "")  # a distinct string object for each softmax
                self._shares.update((x, home) for x in self._kept(made))
        elif name in _PLAIN:
            if all(id(x) in self._weights for x in given) and given:
                self._weights.update(self._kept(made))
            if any(id(x) in self._logits for x in given):
                self._logits.update(self._kept(made))
            for x in given:
                if id(x) in self._shares:
                    self._shares.update((y, self._shares[id(x)]) for y in self._kept(made))
        return result

    def _kept(self, tensors: list[Tensor]) -> list[int]:
        """The ids of tensors, which are kept alive so that ids stay unique."""
        self._alive += tensors
        return [id(x) for x in tensors]
