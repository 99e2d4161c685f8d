"""Groups the attentions of a layout into kinds. Plain data: names and numbers only.

In: a `QKLayout` and the shapes of its parameters. Out: one `Kind` for all attentions that differ only in the numbers in
their parameter names. Attentions that share a weight (layers that read the same keys, a layer that is called twice
with different adapters) form one instance, because their factors depend on each other.

A *block* is a set of rows of one parameter with one learning rate per head in the paper's algorithms. Each head's rows
occur in it once. Blocks that share whole heads are merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from quack_fx.errors import LayoutError
from quack_fx.layout import AttentionSite, QKLayout, Ranges, Role, WeightBlock, merged
from quack_fx.train.program.text import name_template

Names = tuple[int, ...]
"""The numbers in the parameter names of one instance."""


class Unit(NamedTuple):
    """The rows of one head in a block.

    Attributes:
        param: The weight.
        bias: Its bias, if it has one.
        ranges: The rows in both, sorted, with gaps between the ranges.
    """

    param: str
    bias: str | None
    ranges: Ranges

    @classmethod
    def of(cls, block: WeightBlock, ranges: Ranges) -> Unit:
        """The rows of a block that a head uses."""
        return cls(block.param, block.bias, merged(ranges))

    @property
    def names(self) -> tuple[str, ...]:
        """The weight, and its bias if it has one."""
        return (self.param,) if self.bias is None else (self.param, self.bias)


def tensors_of(block: WeightBlock) -> tuple[tuple[str, int], ...]:
    """The weight of a block, and its bias if it has one, each with the axis of its rows."""
    weight = block.param, block.axis
    return (weight,) if block.bias is None else (weight, (block.bias, 0))


@dataclass(frozen=True)
class Rows:
    """A tensor with query or key rows.

    Attributes:
        name: Its name, with numbers replaced by `str.format` fields.
        axis: Axis of the rows.
        count: Number of rows.
    """

    name: str
    axis: int
    count: int


@dataclass(frozen=True)
class Block:
    """A set of rows with one learning rate per head.

    Attributes:
        role: Role in the layout.
        tensors: The tensors with its rows (a weight, and its bias if it has one), as indices into `Kind.tensors`.
        heads: The row ranges of each head, sorted, with gaps between them. Every head has the same number of rows.
    """

    role: Role
    tensors: tuple[int, ...]
    heads: tuple[Ranges, ...]


@dataclass(frozen=True)
class Term:
    """A product of blocks in the logits, for several query heads at once.

    Attributes:
        factors: For each factor, its block (as an index into `Kind.blocks`) and the head of that block that each query
            head reads.
    """

    factors: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Kind:
    """Attentions that differ only in the numbers in their parameter names.

    Attributes:
        title: A short description, such as "GQA, 32 query heads on 8 key heads".
        tensors: The tensors with query or key rows.
        blocks: The blocks.
        terms: The terms of the logits of one instance.
        instances: The numbers in the parameter names, for each instance.
    """

    title: str
    tensors: tuple[Rows, ...]
    blocks: tuple[Block, ...]
    terms: tuple[Term, ...]
    instances: tuple[Names, ...]

    def ends(self) -> dict[int, int]:
        """For each tensor with a tenth of its rows or more after its last query and key row: the rows up to that."""
        last: dict[int, int] = {}
        for block in self.blocks:
            stop = max(stop for head in block.heads for _, stop in head)
            last |= {t: max(stop, last.get(t, 0)) for t in block.tensors}
        return {t: end for t, end in last.items() if end <= 0.9 * self.tensors[t].count}

    def names(self, numbers: Names | None = None) -> list[str]:
        """The tensor names of the instance with the given numbers; by default, of the first instance."""
        own = self.instances[0] if numbers is None else numbers
        return [tensor.name.format(*own).replace("{{", "{").replace("}}", "}") for tensor in self.tensors]


def kinds_of(layout: QKLayout, shapes: Mapping[str, Sequence[int]]) -> tuple[Kind, ...]:
    """Group the attentions of a layout into kinds; attentions that keep a QK norm are left out.

    Arguments:
        layout: The layout.
        shapes: Shape of every parameter that the layout names.

    Raises:
        LayoutError: A parameter is missing, its rows do not fit its shape, or it has rows along two axes.

    Example:
        >>> kind, = kinds_of(find_qk_pairs(model, ids), {name: p.shape for name, p in model.named_parameters()})
    """
    found: dict[Kind, list[Names]] = {}
    for sites in _connected([site for site in layout.sites if site.terms and not site.qk_norm]):
        kind = _kind(sites, shapes)
        numbers: list[int] = []
        tensors = tuple(replace(tensor, name=name_template(tensor.name, numbers)) for tensor in kind.tensors)
        found.setdefault(replace(kind, tensors=tensors), []).append(tuple(numbers))
    return tuple(replace(kind, instances=tuple(sorted(instances))) for kind, instances in found.items())


def _connected(sites: Sequence[AttentionSite]) -> list[list[AttentionSite]]:
    """Sites grouped such that those that share a tensor are in one group. Groups and sites keep the layout's order."""
    groups: list[tuple[set[str], list[int]]] = []  # names of tensors, indices of sites
    for index, site in enumerate(sites):
        names, members = {name for _, block in site.blocks() for name, _ in tensors_of(block)}, [index]
        apart = []
        for group in groups:
            if group[0].isdisjoint(names):
                apart.append(group)
            else:
                names |= group[0]
                members += group[1]
        groups = [*apart, (names, sorted(members))]
    return [[sites[index] for index in members] for _, members in sorted(groups, key=lambda group: group[1])]


# ---- one instance ----------------------------------------------------------------------------------------------------


_Product = tuple[tuple[Role, Unit], ...]


def _kind(sites: Sequence[AttentionSite], shapes: Mapping[str, Sequence[int]]) -> Kind:
    """The kind of one group of sites; its tensors still have full names, without fields."""
    tensors = _tensors(sites, shapes)
    products = [own for site in sites for own in _products(site)]
    blocks = _blocks(products)
    home = {unit: (b, h) for b, (_, units) in enumerate(blocks) for h, unit in enumerate(units)}
    terms = dict.fromkeys(term for own in products for term in _terms(own, home))
    numbers = {name: i for i, name in enumerate(tensors)}
    made = (
        Block(role, tuple(numbers[name] for name in units[0].names), tuple(unit.ranges for unit in units))
        for role, units in blocks
    )
    return Kind(" and ".join(dict.fromkeys(map(_title, sites))), tuple(tensors.values()), tuple(made), tuple(terms), ())


def _title(site: AttentionSite) -> str:
    """A short description of an attention: 'GQA, 32 query heads on 8 key heads'."""
    heads = f"{site.query_heads} head{'s' if site.query_heads > 1 else ''}"
    if site.key_heads != site.query_heads:
        heads = f"{site.query_heads} query heads on {site.key_heads} key head{'s' if site.key_heads > 1 else ''}"
    kind = "attention" if site.kind == "other" else site.kind.upper()
    return f"{kind}{' across two sequences' if site.cross else ''}, {heads}"


def _tensors(sites: Sequence[AttentionSite], shapes: Mapping[str, Sequence[int]]) -> dict[str, Rows]:
    """The tensors of some sites by name, each checked against its shape."""
    found: dict[str, Rows] = {}
    for site, block in ((one, block) for one in sites for _, block in one.blocks()):
        where = f"site {site.name!r}: block of {block.param!r}"
        last = max((stop for ranges in block.heads for _, stop in ranges), default=0)
        for name, axis in tensors_of(block):
            if name not in shapes:
                raise LayoutError(f"{where}: the model has no parameter {name!r}; find the pairs of this very model")
            shape = tuple(shapes[name])
            if axis >= len(shape):
                raise LayoutError(f"{where} has axis {axis}, but the shape of {name!r} is {list(shape)}")
            if last > shape[axis]:
                raise LayoutError(f"{where} goes up to row {last}, but axis {axis} of {list(shape)} has {shape[axis]}")
            known = found.setdefault(name, Rows(name, axis, shape[axis]))
            if known.axis != axis:
                raise LayoutError(
                    f"layout counts the output features of {name!r} along axis {known.axis} and along axis {axis}; "
                    "one parameter can have head rows along one axis only"
                )
    return found


def _products(site: AttentionSite) -> Iterator[list[_Product]]:
    """For each term of a site, the product of each query head that has rows in the term."""
    for term in site.terms:
        one = replace(site, terms=(term,))
        products = [product for head in range(site.query_heads) for product in one.head_terms(head)]
        yield [tuple((block.role, Unit.of(block, ranges)) for block, ranges in product) for product in products]


def _blocks(products: Iterable[Sequence[_Product]]) -> list[tuple[Role, list[Unit]]]:
    """Blocks as lists of units: one block per position in a term; positions that share a unit share a block."""
    blocks: list[tuple[Role, dict[Unit, None]]] = []
    for heads in products:
        for column in zip(*heads, strict=True):
            for units in _alike(unit for _, unit in column):
                shared = [block for block in blocks if not block[1].keys().isdisjoint(units)]
                if not shared:
                    blocks.append((column[0][0], units))
                    continue
                for other in shared[1:]:
                    shared[0][1].update(other[1])
                    blocks = [block for block in blocks if block is not other]
                shared[0][1].update(units)
    return [(role, sorted(units, key=lambda unit: unit.ranges)) for role, units in blocks]


def _alike(column: Iterable[Unit]) -> Iterator[dict[Unit, None]]:
    """Units grouped by tensor and number of rows."""
    groups: dict[tuple[tuple[str, ...], int], dict[Unit, None]] = {}
    for unit in column:
        size = sum(stop - start for start, stop in unit.ranges)
        groups.setdefault((unit.names, size), {})[unit] = None
    yield from groups.values()


def _terms(products: Sequence[_Product], home: Mapping[Unit, tuple[int, int]]) -> Iterator[Term]:
    """Products as terms: one term for all heads with units in the same blocks."""
    by_blocks: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for product in products:
        places = [home[unit] for _, unit in product]
        by_blocks.setdefault(tuple(b for b, _ in places), {})[tuple(h for _, h in places)] = None
    for blocks, heads in by_blocks.items():
        yield Term(tuple(zip(blocks, zip(*heads, strict=True), strict=True)))
