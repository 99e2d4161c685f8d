"""A whole random model: attention modules, the layers around them, wrappers, distractors.

In: decisions. Out: a `RandomModel`: Python source, the module made from it, its inputs, and what is to be found in it.
"""

from __future__ import annotations

import linecache
import sys
import types
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quack_fx.layout import QKLayout

from .attention import AttentionModule, attention_module, class_source
from .choices import Choices
from .distractors import DISTRACTORS
from .truth import Expected, Truth
from .way import ROPES

HEADER = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from einops import rearrange


def relative(score, b, h, t, s):
    return score + (t - s)


def causal(score, b, h, t, s):
    return torch.where(t >= s, score, -float("inf"))
"""


@dataclass(frozen=True)
class RandomModel:
    """A model and the truth about it."""

    source: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    expected: Expected
    choices: Choices

    @property
    def layout(self) -> QKLayout:
        """The truth as a layout."""
        return QKLayout(tuple(t.site() for t in self.expected.sites))


def random_model(choices: Choices) -> RandomModel:
    """Draw a model."""
    sizes = _sizes(choices)
    attention = attention_module(choices, sizes, "Attention")
    source, expected = _around(choices, attention, sizes)
    source = "\n\n".join((HEADER, ROPES, source))
    torch.manual_seed(0)
    module = sys.modules["random_model"] = types.ModuleType("random_model")  # torch.compile asks for it
    name = f"<random model {abs(hash(source))}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), module.__dict__)
    model = module.__dict__["Model"]().eval()
    x = torch.randn(sizes["b"], sizes["t"], sizes["c"])
    inputs = (x, torch.randn(sizes["b"], sizes["s"], sizes["c"] + 2)) if attention.cross else (x,)
    return RandomModel(source, model, inputs, expected, choices)


def _sizes(choices: Choices) -> dict[str, int]:
    """Numbers that are all different, so that none is taken for another; now and then they are not."""
    sizes = {
        "b": choices.pick("batch", [2, 1, 3]),
        "t": choices.pick("tokens", [5, 7, 4]),
        "s": choices.pick("other tokens", [7, 11, 6]),
        "c": choices.pick("width", [13, 17, 12]),
        "k": choices.pick("key heads", [3, 2, 1, 5]),
        "d": choices.pick("head dimension", [4, 2, 6, 3]),
    }
    sizes["h"] = sizes["k"] * choices.pick("group", [1, 1, 2, 3])
    sizes["e"] = choices.pick("value dimension", [sizes["d"], 5, 3])
    if choices.chance("equal sizes", 15):
        sizes |= dict.fromkeys("tsde", max(2, sizes["h"]))
    return sizes


# ---- around it -------------------------------------------------------------------------------------------------------


def _around(choices: Choices, attention: AttentionModule, sizes: dict[str, int]) -> tuple[str, Expected]:
    """The model around an attention: its source and what is to be found in it."""
    source, cross = attention.source, attention.cross
    if not attention.keeps_tokens or choices.pick("layers", [False, True, True]) is False:
        return source + "\n\nModel = Attention\n", Expected(attention.sites)
    arguments = "x, y" if cross else "x"
    distractor = choices.pick("beside", ["", *DISTRACTORS]) if choices.chance("distractor", 3) else ""
    call = choices.pick("call", list(_CALLS))
    depth = choices.pick("depth", [1, 2, 3])
    repeated = choices.pick(
        "layers are", ["apart"] * 8 + ["shared", "shared", "tied", "tied in part", "different", "different"]
    )
    kinds = [attention] * depth
    if repeated == "different" and depth > 1 and call != "forward":
        other = attention_module(choices, _sizes(choices) | {a: sizes[a] for a in "btsc"}, "Other", torch_layer=False)
        if other.keeps_tokens and other.cross == cross:
            kinds[choices.pick("which", range(depth))] = other
            source += "\n\n" + other.source
    source = "\n\n".join(
        (
            source,
            *([_FUNCTION] if call == "function" else []),
            *([DISTRACTORS[distractor].strip() + "\n"] if distractor else []),
        )
    )
    source += "\n\n" + _block(choices, _CALLS[call], arguments, distractor, sizes["c"])
    one = repeated in ("shared", "tied")
    part = _tied_part(choices, attention) if repeated == "tied in part" else ""
    classes = ", ".join("Attention" if kind is attention else "Other" for kind in kinds)
    init = [f"self.blocks = nn.ModuleList(Block(kind) for kind in ({classes},))"]
    if repeated == "shared":
        init = ["self.blocks = nn.ModuleList([Block(Attention)])"]
    elif repeated == "tied" or part:
        name = f"attn.{part}" if part else "attn"
        init += ["for block in self.blocks[1:]:", f"    block.{name} = self.blocks[0].{name}"]
    loop = f"for _ in range({depth}):" if repeated == "shared" else "for block in self.blocks:"
    block = "self.blocks[0]" if repeated == "shared" else "block"
    source += "\n\n" + class_source("Model", init, [loop, f"    x = {block}({arguments})", "return x"], arguments)
    sites: list[Truth] = []
    for i, kind in enumerate(kinds[:1] if one else kinds):
        for site in kind.sites:
            made = site.moved(f"blocks.{i}.attn", _names_of(site, part, i) if part else {})
            # Called past its hooks, a module is not seen; one inside it is.
            name = None if call == "forward" and not site.name else made.name
            _add(sites, replace(made, name=name, calls=depth if one else 1))
    return source, Expected(sites, tuple(f"blocks.{i}.other" for i in range(depth)) if distractor else ())


def _block(choices: Choices, call: str, arguments: str, distractor: str, width: int) -> str:
    """A layer: an attention, perhaps a norm before it, perhaps something else behind it."""
    init, lines = ["self.attn = kind()"], call.format(arguments).splitlines()
    if choices.pick("pre-norm", [False, True]):
        init.append(f"self.norm = nn.LayerNorm({width})")
        lines = ["r, x = x, self.norm(x)", *lines, "x = r + a"]
    else:
        lines.append("x = x + a")
    if distractor:
        init.append(f"self.other = {distractor}({width})")
        lines.append("x = x + self.other(x)")
    return class_source("Block", init, [*lines, "return x"], arguments).replace(
        "__init__(self)", "__init__(self, kind)"
    )


def _add(sites: list[Truth], site: Truth) -> None:
    """One more attention, or another run of one that has nothing but the same parameters."""
    for i, known in enumerate(sites):
        if (known.query, known.key) == (site.query, site.key):
            sites[i] = replace(known, calls=known.calls + 1)
            return
    sites.append(site)


def _tied_part(choices: Choices, attention: AttentionModule) -> str:
    """A parameter or submodule of the attention that all layers share, "" mostly."""
    names = sorted({link.param.split(".")[0] for truth in attention.sites for link in truth.links()})
    return choices.pick("tied part", names) if choices.chance("tied part", 8) else ""


def _names_of(site: Truth, part: str, layer: int) -> dict[str, str]:
    """First names of what layers share."""
    names = {name for link in site.links() for name in (link.param, link.bias) if name and name.split(".")[0] == part}
    return {f"blocks.{layer}.attn.{name}": f"blocks.0.attn.{name}" for name in names}


_CALLS = {
    "module": "a = self.attn({})",
    "forward": "a = self.attn.forward({})",
    "checkpoint": "a = checkpoint(self.attn, {}, use_reentrant=False)",
    "reentrant": "a = checkpoint(self.attn, {}, use_reentrant=True)",
    "no_grad": "with torch.no_grad():\n    a = self.attn({})",
    "function": "a = Run.apply(self.attn, {})",
}

_FUNCTION = """\
class Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, *inputs):
        return module(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient, None
"""
