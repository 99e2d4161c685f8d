"""Equal layers are recorded once: never where it could be seen, and always with the layout of a full recording."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from quack_fx.find import find, find_qk_pairs
from quack_fx.graph.capture import capture
from quack_fx.graph.capture.equal import SMALLEST_GROUP

DEPTH, WIDTH, HEADS = SMALLEST_GROUP + 4, 12, 3
X = torch.ones(2, 5, WIDTH)


class Attention(nn.Module):
    def __init__(self, index: int, window: int | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.index = index
        self.window = window

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.split(self.q(x)) @ self.split(self.k(x)).transpose(-1, -2)
        if self.window is not None:
            logits = logits.masked_fill(torch.ones(5, 5).triu(self.window).bool(), -1e9)
        return self.out((logits.softmax(-1) @ self.split(self.v(x))).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """An attention and a feed-forward layer; what a test changes, it changes in a subclass."""

    def __init__(self, index: int, **more: Any) -> None:
        super().__init__()
        self.attention = Attention(index, **more)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    def __init__(self, kind: type[Layer] = Layer, depth: int = DEPTH) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind(i) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def left_out(model: nn.Module, *args: Any) -> list[str]:
    return [layer.name for layer in capture(model, args, layers_once=True).repeated]


def assert_same_as_in_full(model: nn.Module, *args: Any) -> None:
    before = [(dict(vars(m)), m.training) for m in model.modules()]
    once, full = find_qk_pairs(model, *args), find(model, args, recording=capture(model, args)).layout
    assert once == full
    assert [(dict(vars(m)), m.training) for m in model.modules()] == before


def test_all_but_three_equal_layers_are_left_out() -> None:
    model = Stack()
    assert left_out(model, X) == [f"layers.{i}" for i in range(2, DEPTH - 1)]
    assert_same_as_in_full(model, X)


def test_effort_does_not_grow_with_equal_layers() -> None:
    few, many = (len(capture(Stack(depth=n), [X], layers_once=True).graph_module.graph.nodes) for n in (20, 60))
    assert many - few == 2 * 40  # a stand-in and its result


def test_every_kind_of_layer_is_recorded() -> None:
    class Alternating(Layer):
        def __init__(self, index: int) -> None:
            super().__init__(index, window=1 if index % 2 else 2)

    model = Stack(Alternating)
    kept = {f"layers.{i}" for i in range(DEPTH)} - set(left_out(model, X))
    assert kept == {"layers.0", "layers.1", "layers.2", "layers.3", f"layers.{DEPTH - 1}"}
    assert_same_as_in_full(model, X)


def test_an_index_that_is_read_makes_layers_differ() -> None:
    class Indexed(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / (1 + self.attention.index)

    assert not left_out(Stack(Indexed), X)
    assert_same_as_in_full(Stack(Indexed), X)


class Counting(Layer):
    """The third call of any layer swaps queries and keys; nothing of a layer tells it."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls += 1
        if Counting.calls == 3:
            a = self.attention
            return x + a.out((a.split(a.k(x)) @ a.split(a.q(x)).mT).softmax(-1) @ a.split(a.v(x))).flatten(2)
        return super().forward(x)


def test_a_last_layer_that_does_something_else_gives_the_others_away() -> None:
    Counting.calls = 0
    assert not left_out(Stack(Counting), X)


KEPT: list[Tensor] = []


class Keeping(Layer):
    def forward(self, x: Tensor) -> Tensor:
        KEPT.append(self.up(x))
        return super().forward(x)


class Remembering(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.attention.last = x.shape
        return super().forward(x)


class Writing(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x += self.attention(x)
        return super().forward(x)


class HandingOver(Layer):
    def forward(self, x: Any) -> Any:
        x, cache = x if isinstance(x, tuple) else (x, [])
        cache.append(self.up(x))
        return super().forward(x), cache


@pytest.mark.parametrize("kind", [Keeping, Remembering, Writing])
def test_layers_that_leave_traces_are_all_recorded(kind: type[Layer]) -> None:
    KEPT.clear()
    assert not left_out(Stack(kind), X)
    assert_same_as_in_full(Stack(kind), X)


def test_hooks_see_every_layer() -> None:
    model, seen = Stack(), []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: seen.append(1))
    assert not left_out(model, X)
    assert len(seen) == DEPTH


def test_keys_of_a_layer_that_was_left_out_ask_for_all_of_them() -> None:
    class Shared(Stack):
        """One more attention on what the middle layer gives out, without a projection of its own for the keys."""

        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = layer(x)
                if i == DEPTH // 2:
                    keys = layer.up(x)[..., :WIDTH] * 1.0
            return (self.q(x) @ keys.mT).softmax(-1) @ x

    assert_same_as_in_full(Shared(), X)


def test_logits_handed_from_layer_to_layer_ask_for_all_of_them() -> None:
    class Residual(Layer):
        def forward(self, given: Any) -> Any:
            x, logits = given
            a = self.attention
            logits = logits + a.split(a.q(x)) @ a.split(a.k(x)).mT
            return x + a.out((logits.softmax(-1) @ a.split(a.v(x))).transpose(1, 2).flatten(2)), logits

    class Chain(Stack):
        def forward(self, x: Tensor) -> Tensor:
            given = (self.embed(x), torch.zeros(2, HEADS, 5, 5))
            for layer in self.layers:
                given = layer(given)
            return self.head(given[0])

    assert_same_as_in_full(Chain(Residual), X)


def test_tied_layers_are_one_site_with_all_its_calls() -> None:
    model = Stack()
    for layer in model.layers[1:]:
        for name, p in model.layers[0].named_parameters():
            module, _, last = name.rpartition(".")
            setattr(layer.get_submodule(module), last, p)
    layout = find_qk_pairs(model, X)
    assert [site.calls for site in layout.sites] == [DEPTH]
    assert_same_as_in_full(model, X)


BASE = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, vocab_size=64, num_key_value_heads=2)
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=18, **BASE)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(num_hidden_layers=24, head_dim=8, **BASE)
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            num_hidden_layers=18, num_experts=4, moe_intermediate_size=8, num_experts_per_tok=2, **BASE
        )
    ),
    "t5": lambda: transformers.T5Model(
        transformers.T5Config(num_layers=18, d_model=32, num_heads=4, d_kv=8, d_ff=16, vocab_size=64)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name]().eval()
    inputs: dict[str, Any] = {"input_ids": torch.arange(4)[None]}
    inputs |= {"decoder_input_ids": torch.arange(4)[None]} if name == "t5" else {"use_cache": False}
    recorded = capture(model, (), inputs, layers_once=True)
    assert len(recorded.repeated) >= 10
    full = find(model, (), inputs, recording=capture(model, (), inputs)).layout
    assert find_qk_pairs(model, **inputs) == full


class Rounds(Stack):
    """A stack that runs several times, on more tokens each time."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.cat([super().forward(x), x[:, :1]], 1)
        return x


def test_every_call_of_a_stack_counts_once() -> None:
    assert {site.calls for site in find_qk_pairs(Rounds(), X).sites} == {3}
    assert_same_as_in_full(Rounds(), X)
