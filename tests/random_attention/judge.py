"""One random model, judged: right, refused, wrong or crashed.

In: decisions. Out: a `Verdict`, and its text for people.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quack_fx.errors import QuackError, VerifyError
from quack_fx.find import find_qk_pairs
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.prove import verify_qk_pairs

from .choices import Choices
from .compare import Difference, differences
from .model import RandomModel, random_model


@dataclass(frozen=True)
class Verdict:
    """What came out of one model; `found` is None where the finder raised."""

    model: RandomModel
    found: QKLayout | None
    differences: tuple[Difference, ...]

    @property
    def sort(self) -> str:
        """The first difference's sort; where there is none, "right", or "by design" for an attention refused so."""
        if self.differences:
            return self.differences[0].sort
        expected = self.model.expected
        own = [s for s in self.found.skipped if not s.name.startswith(expected.skips)] if self.found else []
        return "by design" if own and any(t.may_refuse for t in expected.sites) else "right"

    def lines(self) -> Iterator[str]:
        """The model, the truth and what was found, as text."""
        choices = self.model.choices
        yield f"# decisions: {', '.join(choices.told)}\n# replay: {choices.numbers}\n\n{self.model.source}\n"
        yield f"# inputs: {[tuple(x.shape) for x in self.model.inputs]}"
        for what, layout in (("true", self.model.layout), ("found", self.found)):
            if layout is not None:
                for site in layout.sites:
                    yield from _site_lines(what, site)
                yield from (f"# skipped {s.name!r}: {s.code}: {s.reason}" for s in layout.skipped)
                yield f"# verify says of what is {what}: {self._proof(layout)}"
        yield from (f"# {difference.sort}: {difference.text}" for difference in self.differences)
        yield f"# {'WRONG' if self.differences else 'right'}"

    def _proof(self, layout: QKLayout) -> str:
        """What the gradients say about a layout."""
        try:
            report = verify_qk_pairs(self.model.model, layout, *self.model.inputs)
        except VerifyError as error:
            return f"refuted: {error}"
        except QuackError as error:
            return f"{type(error).__name__}: {error}"
        return "proved" if report.complete else f"not proved: {report.not_proved[0].reason}"


def judge(choices: Choices) -> Verdict:
    """Make a model and hold what is found in it against the truth."""
    model = random_model(choices)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the models' own, of torch about checkpoints mostly
            found = find_qk_pairs(model.model, *model.inputs)
    except Exception as error:
        text = "".join(traceback.format_exception(error)[-3:])
        return Verdict(model, None, (Difference(f"crash {type(error).__name__}", text),))
    shapes = {name: tuple(p.shape) for name, p in model.model.named_parameters()}
    wrong = tuple(differences(model.expected, found, shapes))
    return Verdict(model, found, wrong or tuple(_unproved(model, found)))


def _unproved(model: RandomModel, right: QKLayout) -> Iterator[Difference]:
    """What a proof has against a layout that is right."""
    try:
        report = verify_qk_pairs(model.model, right, *model.inputs)
    except VerifyError as error:
        yield Difference("refuted", str(error))
    except QuackError as error:
        yield Difference(f"crash {type(error).__name__}", str(error))
    else:
        yield from (Difference("not proved", f"{site.name!r}: {site.reason}") for site in report.not_proved)


def _site_lines(what: str, site: AttentionSite) -> Iterator[str]:
    yield f"# {what} site {site.name!r} {site.kind} cross={site.cross} calls={site.calls} head map {site.head_map}"
    for side, blocks in (("query", site.query), ("key", site.key)):
        for i, block in enumerate(blocks):
            yield f"#   {side} {i} {block.role} {block.param} axis {block.axis} bias {block.bias} {_short(block.heads)}"
    terms = [(t.query, t.key) for t in site.terms]
    yield f"#   terms {terms} norms {site.qk_norm} latent norms {site.latent_norm} scale {site.logit_scale}"


def _short(heads: Sequence[object]) -> str:
    return " ".join(str(h).replace(" ", "") for h in heads)
