"""Reports about a recorded training run: rich text for a terminal, a self-contained HTML page.

In: a file that `quack_fx.RunLog` writes, complete or still growing. Out: `read` and `RunFile` (the run as data),
`summary` (a rich renderable), `html` (a string).

    read.py       JSON lines -> a `Run`, as far as the file goes
    series.py     a `Run` -> curves over steps, and the growth of every head
    chart.py      curves as SVG
    heatmap.py    learning-rate scales of all heads over time as a picture
    terminal.py   the summary
    page.py       the page
"""

from __future__ import annotations

from quack_fx.report.run.page import page as html
from quack_fx.report.run.read import Record, Run, RunFile, Sample, read
from quack_fx.report.run.terminal import Summary as summary

__all__ = ["Record", "Run", "RunFile", "Sample", "html", "read", "summary"]
