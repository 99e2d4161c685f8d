"""Writes docs/stability.md and its figures.

In: a file of results, and a text that a person wrote about them. Out: the page. Every number on it is computed from the
results, so that the page is honest where QuacK does not win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.stability import plots
from benchmarks.stability.claims import CLAIMS, answers, can_answer
from benchmarks.stability.grid import PRESETS, Method, Setup
from benchmarks.stability.records import Records
from benchmarks.stability.summary import CLOSE, Panel, Point, Spread, panels

_QUACK = Method("quack", 1.0)
"""QuacK with the default tau."""


def write_report(records: Records, docs: Path) -> None:
    """Write the page and its figures.

    Arguments:
        records: The results.
        docs: The folder of pages; figures go to its folder `pictures`.

    Raises:
        SystemExit: There are no results.
    """
    found = panels(records)
    if not found:
        raise SystemExit(f"{str(records.path)!r} has no runs yet")
    setup = PRESETS[records.common["preset"]]
    (docs / "pictures").mkdir(parents=True, exist_ok=True)
    for name, svg in _pictures(found, setup).items():
        (docs / "pictures" / f"stability-{name}.svg").write_text(svg)
    (docs / "stability.md").write_text("\n".join(_page(records, found, setup)) + "\n")


def _pictures(found: Sequence[Panel], setup: Setup) -> dict[str, str]:
    """The figures, by name; the figure of losses needs several learning rates."""
    lrs = [_telling(panel, setup) for panel in found]
    wide = [panel for panel in found if len(panel.lrs) > 1]
    return ({"loss": plots.loss_by_lr(wide)} if wide else {}) | {
        "logit": plots.over_steps(found, lrs, "largest logit", lambda r: r.result.curves.logit),
        "change": plots.over_steps(found, lrs, "mean change of a logit by a step", lambda r: r.result.curves.change),
        "training": plots.over_steps(found, lrs, "training loss", lambda r: r.result.curves.loss),
    }


def _telling(panel: Panel, setup: Setup) -> float:
    """The learning rate for a panel's curves over steps: the first one of the grid that was run."""
    order = setup.lrs[panel.optimizer]
    return min(panel.lrs, key=lambda lr: order.index(lr) if lr in order else len(order))


def _page(records: Records, found: Sequence[Panel], setup: Setup) -> Iterator[str]:
    yield "# Does it help? Small models"
    yield ""
    yield from _setting(records, found, setup)
    yield ""
    yield from _sums(found)
    yield from _claims([panel for panel in found if can_answer(panel)])
    for panel in found:
        yield f"## {panel.title}"
        yield ""
        if len(panel.lrs) > 1:
            yield from _best(panel)
            yield ""
        yield "Validation loss (nats a byte):"
        yield ""
        yield from _grid(panel, str)
        yield ""
        yield "Largest logit, of all seeds and points:"
        yield ""
        yield from _grid(panel, lambda point: f"{point.largest:.3g}")
        yield ""
        yield "Mean change of a logit by a step, over the second half of a run:"
        yield ""
        yield from _grid(panel, lambda point: _short(point.change))
        yield ""


def _setting(records: Records, found: Sequence[Panel], setup: Setup) -> Iterator[str]:
    """The setting of the experiment."""
    c, shape = records.common, setup.shape
    every = [record for record in records]
    seeds = sorted({record.run.seed for record in every})
    planned = sum(1 for long in (False, True) for _ in setup.runs(long))
    seconds = sum(record.result.seconds for record in every)
    source = _shown(records.path)
    yield f"Written by `python -m benchmarks.stability report` from `{source}`; `make experiment` does the runs."
    yield ""
    yield (
        f"{len(every)} of {planned} planned runs, {'seeds' if len(seeds) > 1 else 'seed'} "
        f"{', '.join(map(str, seeds))}, "
        f"{seconds / 3600:.1f} hours of one thread; torch {c['torch']}, Python {c['python']}. A language model of "
        f"bytes reads the sources of Python's standard library (sha256 `{c['text']}`), "
        f"{setup.sequences * setup.accumulate} sequences of {setup.positions} bytes a step: {shape.layers} layers of "
        f"width {shape.width}, {shape.heads} heads, SwiGLU of {shape.ffn_width}, RMS norms before each block, tied "
        f"embeddings. MHA is Qwen3's without its QK norm, each head with keys of its own; MLA is the paper's, with "
        f"latents of {shape.q_latent} and {shape.kv_latent} and no norms on them. Weights start with standard "
        f"deviation 1/√{shape.width}. Learning rates grow over the first tenth of the steps and are constant then, as "
        f"in the paper; no weight decay. Beside Muon, AdamW trains embeddings and gains at {setup.other_lr:g}; alone "
        f"it trains all at the learning rate in question."
    )
    yield ""
    yield "| method | what |"
    yield "| --- | --- |"
    yield "| none | the model as it is |"
    yield "| qk-norm | RMS norms with gains on queries and keys, put in by `insert_qk_norm` |"
    yield "| qk-clip T | after each step, query and key rows of heads with a logit above T are scaled down |"
    yield "| constant τ | the updates of all query and key rows times τ |"
    yield "| quack τ | QuacK with that `tau` |"
    yield "| compositional τ | QuacK's nearest published relative, for MHA; [rivals.md](rivals.md) has all formulas |"
    yield ""
    yield (
        "Numbers are means over seeds, with ± their standard deviation where there are two or more. The largest logit "
        f"and the change of logits by a step are those of a fixed batch that is not trained on, at {setup.points} "
        "points of a run. A run diverged where a loss or a logit was infinite or no number."
    )


def _sums(found: Sequence[Panel]) -> Iterator[str]:
    """A table of all methods, QuacK compared with the others, and the figures."""
    yield "## In short"
    yield ""
    yield (
        "Loss of each method at its best learning rate, lower is better. *Works at* counts, of the learning rates that "
        f"were run, those at which a method is at most {CLOSE} above the best loss of all methods."
    )
    yield ""
    columns = [[panel.title, *(["works at"] if len(panel.lrs) > 1 else [])] for panel in found]
    yield f"| method | {' | '.join(' | '.join(own) for own in columns)} |"
    yield "| --- |" + " --- |" * sum(map(len, columns))
    for method in dict.fromkeys(method for panel in found for method in panel.methods):
        yield f"| {method.name} | {' | '.join(cell for panel in found for cell in _sum(panel, method))} |"
    yield ""
    for panel in found:
        yield from _against(panel)
    yield ""
    for name, text in _CAPTIONS.items():
        if name != "loss" or any(len(panel.lrs) > 1 for panel in found):
            yield f"![{text}](pictures/stability-{name}.svg)"
            yield ""


def _sum(panel: Panel, method: Method) -> Iterator[str]:
    """A method's cells in the table of all panels."""
    best = panel.best(method)
    yield "-" if best is None else str(panel.point(method, best).loss)
    if len(panel.lrs) > 1:
        done = [lr for lr in panel.lrs if panel.point(method, lr).records]
        yield f"{len(panel.close(method))} of {len(done)}" if done else "-"


_CAPTIONS = {
    "loss": "Validation loss against the learning rate; bars from the lowest seed to the highest",
    "logit": "Largest logit of the probe batch over steps",
    "change": "Mean change of a logit by a step, over steps",
    "training": "Training loss over steps",
}


def _against(panel: Panel) -> Iterator[str]:
    """QuacK with tau 1 compared with each other method, each at its best learning rate, seed by seed."""
    differences = []
    for other in panel.methods:
        if other.kind not in ("quack", "constant"):
            difference = panel.difference(_QUACK, other, panel.best)
            if difference.seeds:
                differences.append(f"{difference:+.3f} against {other.name}")
    if differences:
        where = "each at its best learning rate" if len(panel.lrs) > 1 else f"at {panel.lrs[0]:g}"
        yield f"- {panel.title}: loss of {_QUACK.name}, {where}: {', '.join(differences)}."


def _claims(grids: Sequence[Panel]) -> Iterator[str]:
    """The paper's claims, and whether they hold."""
    if not grids:
        return
    yield "## The paper's claims"
    yield ""
    yield (
        "Those of section 4, about a model of 1B weights that was trained with Muon; here on the models above. Of two "
        "losses one is lower where the difference, seed by seed, is more than twice its standard deviation; otherwise "
        "the runs *cannot tell*."
    )
    yield ""
    found = [dict(answers(panel)) for panel in grids]
    yield "| claim | " + " | ".join(panel.title for panel in grids) + " |"
    yield "| --- |" + " --- |" * len(grids)
    for claim in CLAIMS:
        cells = [own[claim].verdict if claim in own else "" for own in found]
        yield f"| {claim.text} | " + " | ".join(cells) + " |"
    yield ""
    for claim in CLAIMS:
        yield f"- {claim.text} ({claim.test}):"
        for panel, own in zip(grids, found, strict=True):
            if claim in own:
                yield f"    - {panel.title}: {own[claim].numbers}"
    yield ""


def _best(panel: Panel) -> Iterator[str]:
    """The best learning rate of each method, and its results there."""
    yield f"| method | best lr | loss | largest logit | at most {CLOSE} above the best of all |"
    yield "| --- | --- | --- | --- | --- |"
    for method in panel.methods:
        best, close = panel.best(method), panel.close(method)
        point = panel.point(method, best) if best is not None else Point()
        works = ", ".join(f"{lr:g}" for lr in close) or "at none"
        shown = "-" if best is None else f"{best:g}"
        yield f"| {method.name} | {shown} | {point.loss} | {point.largest:.3g} | {works} |"


def _grid(panel: Panel, cell: Callable[[Point], str]) -> Iterator[str]:
    """Methods by learning rates."""
    yield "| method | " + " | ".join(f"{lr:g}" for lr in panel.lrs) + " |"
    yield "| --- |" + " --- |" * len(panel.lrs)
    for method in panel.methods:
        points = [panel.point(method, lr) for lr in panel.lrs]
        yield f"| {method.name} | {' | '.join(cell(point) if point.records else '-' for point in points)} |"


def _short(value: Spread) -> str:
    """A change of logits; of its deviation one digit is enough."""
    deviation = "" if value.deviation is None else f" ± {value.deviation:.1g}"
    return "-" if not value.seeds else f"{value.mean:.2g}{deviation}"


def _shown(path: Path) -> str:
    root = Path(__file__).parents[2]
    return path.resolve().relative_to(root).as_posix() if path.resolve().is_relative_to(root) else path.name
