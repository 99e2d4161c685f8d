"""Learning-rate scales of all heads over time as a picture.

In: the samples of a run. Out: for each block (q, k, uq, ...) an SVG element with one row per head and time from left to
right; the colour shows the ratio of a scale to the head's first one. The cells are an embedded PNG, so that a thousand
heads take a few kilobytes; its neutral colour is transparent, which suits light and dark pages.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from quack_fx.report.run.read import SCALE, Run
from quack_fx.report.run.series import extent, number, site_name, spread

SLOWER, FASTER, BROKEN = (14, 140, 160), (214, 64, 140), (230, 150, 30)
_LEVELS = 16
"""Shades on each side of the neutral one."""
_NOT_FINITE = 2 * _LEVELS + 1
_MOST_CELLS, _MOST_COLUMNS, _MOST_LABELS = 1_000_000, 160, 26
_WIDTH, _LEFT, _TOP, _BOTTOM = 1040, 210, 4, 24


@dataclass(frozen=True)
class HeatMap:
    """The scales of one block in all attentions: for each its name, and the scales of its heads at every sample,
    [samples][heads]. `steps` are those of the samples."""

    block: str
    sites: tuple[tuple[str, tuple[tuple[float, ...], ...]], ...]
    steps: tuple[int, ...]


def heat_maps(run: Run) -> list[HeatMap]:
    """The heat maps of a run, one per block, all with the same steps, few enough for a page of limited size."""
    if run.last is None:
        return []
    names = [name for name in run.last.heads if name[1].endswith(f"/{SCALE}")]
    sizes = {name: len(run.last.heads[name]) for name in names}
    # Only samples with all metrics, in their present size, have a cell for every row.
    known = [s for s in run.samples if all(len(s.heads.get(name, ())) == size for name, size in sizes.items())]
    if not known or known[-1] is not run.last:
        known.append(run.last)
    columns = max(2, min(_MOST_COLUMNS, _MOST_CELLS // max(1, sum(sizes.values()))))
    samples = spread(known, columns)
    sites: dict[str, list[tuple[str, tuple[tuple[float, ...], ...]]]] = {}
    for site, metric in names:
        scales = tuple(tuple(sample.heads[site, metric]) for sample in samples)
        sites.setdefault(metric.rpartition("/")[0], []).append((site, scales))
    steps = tuple(sample.step for sample in samples)
    return [HeatMap(block, tuple(of_block), steps) for block, of_block in sites.items()]


def reach(maps: Sequence[HeatMap]) -> float:
    """The largest distance of any scale from its first one, in octaves (powers of two); at least 0.05."""
    samples = ((values, scales[0]) for heat in maps for _, scales in heat.sites for values in scales)
    found = (abs(_octaves(now, first)) for values, firsts in samples for now, first in zip(values, firsts, strict=True))
    return max([0.05, *(one for one in found if math.isfinite(one))])


def picture(heat: HeatMap, most: float) -> str:
    """The SVG element of a heat map; the colour is full at a distance of `most` octaves from the first scale."""
    rows = sum(len(scales[0]) for _, scales in heat.sites)
    height = max(1.0, min(14.0, 560 / rows)) * rows if rows < 1200 else 1200.0
    height = max(height, 14.0 * min(len(heat.sites), _MOST_LABELS))
    inner = _WIDTH - _LEFT - 8
    label = escape(in_words(heat))
    parts = [
        f'<svg class="heat" role="img" viewBox="0 0 {_WIDTH} {height + _TOP + _BOTTOM:.0f}" aria-label="{label}">',
        f'<image x="{_LEFT}" y="{_TOP}" width="{inner}" height="{height:.1f}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{_png(_cells(heat, most))}"/>',
    ]
    labelled = {site for site, _ in spread(heat.sites, _MOST_LABELS)}
    top = float(_TOP)
    for site, scales in heat.sites:
        size = height * len(scales[0]) / rows
        if site in labelled:
            text = site_name(site)
            text = text if len(text) <= 28 else "…" + text[-27:]
            parts.append(f'<text x="{_LEFT - 8}" y="{top + size / 2 + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        parts.append(f'<path class="grid" d="M{_LEFT} {top:.1f}H{_WIDTH - 8}"/>')
        parts.append(
            f'<rect class="hit" x="{_LEFT}" y="{top:.1f}" width="{inner}" height="{size:.1f}">'
            f"<title>{escape(f'{site_name(site)}: {extent(scales[0])} at first, {extent(scales[-1])} at the end')}"
            "</title></rect>"
        )
        top += size
    parts.append(f'<path class="grid" d="M{_LEFT} {top:.1f}H{_WIDTH - 8}"/>')
    for i in spread(range(len(heat.steps)), 7):
        x = _LEFT + inner * (i + 0.5) / len(heat.steps)
        parts.append(f'<text x="{x:.1f}" y="{top + 17:.1f}" text-anchor="middle">{heat.steps[i]:,}</text>')
    return "".join([*parts, "</svg>"])


def legend(most: float) -> str:
    """What the colours mean."""
    shades = range(-_LEVELS, _LEVELS + 1)
    boxes = "".join(
        f'<rect x="{(i + _LEVELS) * 9}" y="2" width="9" height="14" style="fill:rgb{_rgb(i)};opacity:{_alpha(i):.2f}"/>'
        for i in shades
    )
    low, high = number(2**-most), number(2**most)
    return (
        f'<p class="soft">{low} <svg class="legend" viewBox="0 0 {9 * len(shades)} 18" aria-hidden="true">{boxes}</svg>'
        f" {high} times the head's first scale in this record; left is slower, right is faster"
        f' <span class="broken">■</span> not finite</p>'
    )


def in_words(heat: HeatMap) -> str:
    """What a picture shows, for those who do not see it."""
    values = [value for _, scales in heat.sites for value in scales[-1] if math.isfinite(value)]
    heads = sum(len(scales[0]) for _, scales in heat.sites)
    now = f"between {number(min(values))} and {number(max(values))}" if values else "not finite"
    return (
        f"Learning-rate scale of {heat.block}, {heads} rows of {len(heat.sites)} attentions, steps {heat.steps[0]} to "
        f"{heat.steps[-1]}; at the end {now}"
    )


def _octaves(now: float, first: float) -> float:
    """Distance of a scale from the first one, in powers of two; NaN unless both are positive and finite."""
    return math.log2(now) - math.log2(first) if 0 < now < math.inf and 0 < first < math.inf else math.nan


def _cells(heat: HeatMap, most: float) -> list[bytes]:
    """Colour indices, one row per head."""
    rows = []
    for _, scales in heat.sites:
        for head, first in enumerate(scales[0]):
            levels = (_octaves(values[head], first) / most * _LEVELS for values in scales)
            rows.append(bytes(_NOT_FINITE if math.isnan(x) else _LEVELS + round(x) for x in levels))
    return rows


def _rgb(level: int) -> tuple[int, int, int]:
    return BROKEN if level > _LEVELS else FASTER if level > 0 else SLOWER


def _alpha(level: int) -> float:
    return min(1.0, abs(level) / _LEVELS)


def _png(rows: Sequence[bytes]) -> str:
    """A PNG of colour indices, as base64; its palette includes transparency."""
    levels = range(-_LEVELS, _LEVELS + 2)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(part for level in levels for part in _rgb(level))),
        (b"tRNS", bytes(round(255 * _alpha(level)) for level in levels)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 9)),
        (b"IEND", b""),
    ]
    whole = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return base64.b64encode(whole).decode()
