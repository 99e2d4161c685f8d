"""The generator of random attentions can be trusted, and the finder is right on what it makes.

`make fuzz` tries thousands more. A failure prints the source of a small model, the truth and what was found.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from random_attention import Choices, RandomModel, all_choices, differences, judge, random_model, shrink

from quack_fx.layout import AttentionSite, QKLayout, WeightBlock
from quack_fx.prove import verify_qk_pairs

SAMPLE = range(1000, 1040)


def shapes(made: RandomModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in made.model.named_parameters()}


def shares_a_bias(made: RandomModel) -> bool:
    """Whether a bias has more entries than the weight beside it has rows."""
    size = shapes(made)
    blocks = [block for site in made.layout.sites for _, block in site.blocks()]
    return any(b.bias is not None and size[b.bias][0] != size[b.param][b.axis] for b in blocks)


# ---- the generator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SAMPLE)
def test_the_truth_is_no_different_from_itself(number: int) -> None:
    made = random_model(Choices.seeded(number))
    if any(t.loops and t.name is None for t in made.expected.sites):
        pytest.skip("sites without a name cannot be told apart where heads are looped over")
    assert differences(made.expected, made.layout, shapes(made)) == []


def test_gradients_prove_the_truth() -> None:
    """The generator and the proof share nothing, so neither of them can be wrong alone."""
    proved = 0
    for number in range(3000, 3040):
        made = random_model(Choices.seeded(number))
        # A loop over heads is as many attentions, and of a bias that several weights share a block names a part.
        if not any(t.loops for t in made.expected.sites) and not shares_a_bias(made):
            proved += verify_qk_pairs(made.model, made.layout, *made.inputs).complete
    assert proved >= 25


def test_a_number_always_gives_the_same_model() -> None:
    first, second = (random_model(Choices.seeded(7)) for _ in range(2))
    assert first.source == second.source and first.layout == second.layout
    assert random_model(Choices.replayed(first.choices.numbers)).source == first.source


def test_numbers_give_different_models() -> None:
    assert len({random_model(Choices.seeded(n)).source for n in SAMPLE}) == len(SAMPLE)


def test_shrinking_keeps_what_fails_and_drops_the_rest() -> None:
    small = shrink([3, 1, 4, 1, 5, 9, 2, 6], lambda numbers: 9 in numbers and 4 in numbers)
    assert small == [4, 9]


# ---- the comparison sees every kind of mistake -----------------------------------------------------------------------


def shifted(block: WeightBlock) -> WeightBlock:
    return replace(block, heads=(*block.heads[1:], block.heads[0]))


def wrong_layouts(site: AttentionSite) -> dict[str, AttentionSite]:
    """Layouts that are wrong in one thing."""
    wrong = {
        "sides": replace(site, query=site.key, key=site.query),
        "query rows": replace(site, query=tuple(map(shifted, site.query))),
        "head map": replace(site, head_map=site.head_map[::-1]),
        "bias": replace(site, query=(replace(site.query[0], bias="other"), *site.query[1:])),
        "terms": replace(site, terms=site.terms[1:]),
        "calls": replace(site, calls=9),
    }
    return wrong


def test_mistakes_are_seen() -> None:
    seen = 0
    for number in range(1000, 1100):
        made = random_model(Choices.seeded(number))
        truth = made.expected.sites[0]
        if truth.loops or truth.unchecked or "design=tied" in made.choices.told:
            continue
        site = made.layout.sites[0]
        if site.query_heads != site.key_heads or site.query_heads < 2 or len(site.query) != 1 or len(site.key) != 1:
            continue
        for name, wrong in wrong_layouts(site).items():
            found = QKLayout((wrong, *made.layout.sites[1:]))
            assert differences(made.expected, found, shapes(made)), (number, name)
            seen += 1
    assert seen >= 30


# ---- the finder ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(all_choices())
def test_what_is_found_is_true(choices: Choices) -> None:
    verdict = judge(choices)
    assert not verdict.differences, "\n".join(verdict.lines())


@pytest.mark.parametrize("number", range(20))
def test_what_is_found_is_true_of_larger_models(number: int) -> None:
    """Numbers drawn evenly: hypothesis keeps to small models."""
    verdict = judge(Choices.seeded(number))
    assert not verdict.differences, "\n".join(verdict.lines())
