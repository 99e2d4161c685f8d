"""Which products lie behind an operand of the logits, and which weight rows receive a gradient through them.

In: a `Recording`. Out: for each softmax its logit products, and for each of their operands a tree of `Factor`s, the
weight products met on the way back, from the logits outwards. `gradients` then sends a seed down that tree.

The way back ends where the attention begins: at a tensor that also feeds something else, such as the residual stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from quack_fx.verify.watch import Product, Recording, Softmax

_LINEAR_NODES = (
    *("View", "UnsafeView", "Reshape", "ReshapeAlias", "AsStrided", "Permute", "Transpose", "T", "Mt", "Expand"),
    *("Slice", "Select", "Split", "SplitWithSizes", "Unbind", "Unsqueeze", "Squeeze", "Cat", "Stack", "Narrow"),
    *("Clone", "Copy", "Copys", "CopySlices", "ToCopy", "Alias", "Index", "IndexSelect", "Gather", "Repeat", "Flatten"),
    *("Mul", "Div", "Add", "Sub", "Neg", "Sum", "ConstantPadNd", "Roll", "Flip", "Unflatten", "Chunk"),
    *("Pow", "Mean", "Rsqrt", "Sqrt", "Reciprocal", "LinalgVectorNorm", "Norm", "ClampMin", "Var", "VarMean", "Std"),
    *("NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "FusedRmsNorm", "RmsNorm", "CudnnBatchNorm"),
)
"""Autograd nodes, without "Backward0", that move features, scale them or normalise them."""


@dataclass(eq=False)
class Factor:
    """One weight product behind an operand.

    Attributes:
        product: The product that ran.
        weights: Positions in `product.args` of the factors that parameters alone reach.
        params: Names of the parameters behind those factors.
        biases: Names of the parameters that the product adds.
        linear: Whether only norms and changes of shape lie between it and the factor nearer to the logits.
        sole: Whether nothing is added to it on the way.
        outer: Factors farther out.
    """

    product: Product
    weights: tuple[int, ...]
    params: frozenset[str]
    biases: frozenset[str]
    linear: bool
    sole: bool
    outer: list[Factor] = field(default_factory=list)


class Chains:
    """Questions about the autograd graph of one recorded forward pass.

    Arguments:
        model: The model that ran.
        recording: What ran.
    """

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.recording = recording
        self._name = {id(p): name for name, p in model.named_parameters()}
        self._product = {p.node: p for p in recording.products if p.node is not None}
        self._softmax = {s.node: s for s in recording.softmaxes if s.node is not None}

    def logit_products(self, softmax: Softmax) -> list[Product]:
        """The products whose sum, scaled and masked, is this softmax's input."""
        return self._back(softmax.logits).products

    def is_attention(self, softmax: Softmax) -> bool:
        """Whether a product of two data tensors feeds the softmax, and the softmax feeds another."""
        return any(all(p.data) for p in self.logit_products(softmax)) and softmax in self._weighs

    def attention_nodes(self, softmaxes: Iterable[Softmax]) -> frozenset[Node | None]:
        """Nodes of the logit products and the value products of some softmaxes."""
        return frozenset(p.node for s in softmaxes for p in (*self.logit_products(s), *self._weighs.get(s, ())))

    def params_behind(self, softmax: Softmax) -> set[str]:
        """Names of the parameters in the weight products nearest to a softmax's logits."""
        edges = [p.edges[i] for p in self.logit_products(softmax) for i in p.factors]
        return {n for e in edges if e is not None for p in self._back(e).products for n in self._factor(p).params}

    def factors(self, edge: GradientEdge | None, attention: Set[Node | None]) -> list[Factor]:
        """The tree of weight products behind an operand; empty where none lies behind it.

        Arguments:
            edge: Edge of the operand.
            attention: Nodes of the products of this attention, from `attention_nodes`.
        """
        return self._factors(edge, attention, nearest=True) if edge is not None else []

    def _factors(self, edge: GradientEdge, attention: Set[Node | None], *, nearest: bool) -> list[Factor]:
        """Factors before an edge; all but the nearest must feed this attention and nothing else."""
        back = self._back(edge)
        found = []
        for product in back.products:
            factor = self._factor(product)
            if not factor.weights or not (nearest or self._private(product, attention)):
                continue
            factor.linear = nearest or back.linear
            factor.sole = len(back.products) == 1 and not back.embedded
            for position in product.factors:
                source = product.edges[position]
                if position not in factor.weights and source is not None:
                    factor.outer += self._factors(source, attention, nearest=False)
            found.append(factor)
        return found

    def _factor(self, product: Product) -> Factor:
        """A product as a factor that stands alone."""
        weights = tuple(i for i, data in zip(product.factors, product.data, strict=True) if not data)
        if len(weights) == 2:
            # The input is made of parameters as well (learned queries): the weight is the plainer of the two.
            plain = [i for i in weights if (e := product.edges[i]) is not None and self._is_plain(e)]
            weights = (plain[0],) if len(plain) == 1 else weights
        params = frozenset(name for i in weights for name in self._params(product.edges[i]))
        biases = self._params(product.edges[product.added]) if product.added is not None else ()
        return Factor(product, weights, params, frozenset(biases), linear=True, sole=True)

    def _is_plain(self, edge: GradientEdge) -> bool:
        """Whether an operand is one parameter, moved around at most."""
        return not self._back(edge).products and len(self._leaves(edge)) == 1

    def gradients(self, edge: GradientEdge, factors: Sequence[Factor], seed: Tensor) -> dict[str, Tensor]:
        """Gradient that each parameter of a tree of factors receives, seeded on the operand the tree belongs to.

        Arguments:
            edge: Edge of the operand.
            factors: Its tree.
            seed: Gradient of the operand.

        Returns:
            Gradient by name of parameter, summed over the factors that read it.
        """
        total: dict[str, Tensor] = {}
        nodes = [GradientEdge(f.product.node, 0) for f in factors if f.product.node is not None]
        arriving = torch.autograd.grad([edge], nodes, [seed], retain_graph=True, allow_unused=True) if nodes else ()
        for factor, gradient in zip(factors, arriving, strict=True):
            if gradient is None:
                continue
            product = factor.product
            by_position = product.replay(gradient)
            for position, part in by_position.items():
                source = product.edges.get(position)
                if source is None:
                    continue
                if position in factor.weights or position == product.added:
                    _add(total, self._to_params(source, part))
                else:
                    _add(total, self.gradients(source, factor.outer, part))
        return total

    def size_response(self, edge: GradientEdge, factors: Sequence[Factor], seed: Tensor) -> Tensor:
        """Derivative of <seed, operand> when the nearest products of its tree grow by a common factor.

        By Euler's rule it is the operand's own part along the seed where the operand is linear in them, and zero where
        a norm has taken their size away.
        """
        nodes = [GradientEdge(f.product.node, 0) for f in factors if f.product.node is not None]
        arriving = torch.autograd.grad([edge], nodes, [seed], retain_graph=True, allow_unused=True) if nodes else ()
        response = seed.new_zeros(())
        for factor, gradient in zip(factors, arriving, strict=True):
            if gradient is not None:
                parts = factor.product.replay(gradient)
                own = [i for i in (*factor.weights, factor.product.added) if i in parts]
                response = response + sum((parts[i] * factor.product.args[i]).sum() for i in own)
        return response

    def added_biases(
        self, edge: GradientEdge, seed: Tensor, names: Iterable[str], model: nn.Module
    ) -> dict[str, Tensor]:
        """Gradients of parameters that are added by an op of their own, not inside a product."""
        params = {name: model.get_parameter(name) for name in names}
        gradients = torch.autograd.grad([edge], list(params.values()), [seed], retain_graph=True, allow_unused=True)
        return {name: g for name, g in zip(params, gradients, strict=True) if g is not None}

    def _to_params(self, edge: GradientEdge, gradient: Tensor) -> dict[str, Tensor]:
        """Carry the gradient of a weight operand (transposed, sliced, merged, cast) to the parameters themselves."""
        leaves = self._leaves(edge)
        edges = [GradientEdge(node, 0) for node in leaves.values()]
        arriving = torch.autograd.grad([edge], edges, [gradient], retain_graph=True, allow_unused=True)
        return {name: g for name, g in zip(leaves, arriving, strict=True) if g is not None}

    def _params(self, edge: GradientEdge | None) -> Iterable[str]:
        return self._leaves(edge) if edge is not None else ()

    def _leaves(self, edge: GradientEdge) -> dict[str, Node]:
        """Accumulation nodes of the parameters behind an edge, by name."""
        leaves = {}
        for node in _reachable([edge.node]):
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self._name:
                leaves[self._name[id(variable)]] = node
        return leaves

    def _back(self, edge: GradientEdge) -> _Back:
        """Walk from an edge back to the nearest products."""
        back = _Back()
        for node in _reachable([edge.node], stop=self._product.keys() | self._softmax.keys()):
            name = node.name().removeprefix("torch::autograd::").split("Backward")[0]
            if node in self._product:
                back.products.append(self._product[node])
            elif node in self._softmax:
                back.softmaxes.append(self._softmax[node])
                back.linear = False
            elif "Embedding" in name:
                back.embedded = True
            elif name != "AccumulateGrad" and name not in _LINEAR_NODES:
                back.linear = False
        return back

    @cached_property
    def _weighs(self) -> dict[Softmax, list[Product]]:
        """For each softmax the products that weigh values with it."""
        weighs = defaultdict(list)
        for product in self.recording.products:
            for position in product.factors:
                edge = product.edges[position]
                for softmax in self._back(edge).softmaxes if edge is not None and any(product.data) else ():
                    weighs[softmax].append(product)
        return dict(weighs)

    @cached_property
    def _readers(self) -> dict[Node, list[Node]]:
        """The autograd graph turned round: for each node, those that use its result."""
        readers = defaultdict(list)
        starts = [*self.recording.roots, *(s.logits.node for s in self.recording.softmaxes)]
        for node in _reachable(starts):
            for source, _ in node.next_functions:
                if source is not None:
                    readers[source].append(node)
        return readers

    def _private(self, product: Product, attention: Set[Node | None]) -> bool:
        """Whether every way from a product's result leads into this attention."""
        todo, seen = [product.node], set()
        while todo:
            node = todo.pop()
            if node in seen or node is None:
                continue
            seen.add(node)
            if node is not product.node and node in attention:
                continue
            if not self._readers[node]:
                return False
            todo += self._readers[node]
        return True


@dataclass
class _Back:
    """What a walk back met: products, softmaxes, a token embedding, anything that is not a norm or a move."""

    products: list[Product] = field(default_factory=list)
    softmaxes: list[Softmax] = field(default_factory=list)
    embedded: bool = False
    linear: bool = True


def _reachable(starts: Iterable[Node], stop: Iterable[Node] = ()) -> Iterator[Node]:
    """Nodes behind some nodes, these included; what lies behind a node of `stop` is left out."""
    stop = set(stop)
    todo, seen = list(starts), set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node not in stop:
            todo += [source for source, _ in node.next_functions if source is not None]


def _add(total: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, gradient in more.items():
        total[name] = total[name] + gradient if name in total else gradient
