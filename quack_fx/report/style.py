"""What all pages share: the frame of an HTML document, and its style.

In: a title and the parts of a body. Out: the document as a string. It loads nothing and follows the reader's light or
dark mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from quack_fx import __version__

_STYLE = """
:root { --bg: #fbfbfa; --card: #ffffff; --ink: #1d2330; --soft: #667085; --line: #e3e5ea; --mark: #b4690e;
  --query: #0b7285; --query-bg: #e3f4f7; --key: #a61e6b; --key-bg: #fceaf4; color-scheme: light dark;
  --mono: ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #12151b; --card: #1a1f28; --ink: #e7eaf0; --soft: #98a2b3; --line: #2c3340; --mark: #ffc078;
  --query: #66d9e8; --query-bg: #10313a; --key: #f783c4; --key-bg: #3a1630; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 14px; margin: 22px 0 8px; color: var(--soft); font-weight: 600; }
p { margin: 4px 0; }
li { margin: 3px 0; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
.soft { color: var(--soft); }
span.query { color: var(--query); }
span.key { color: var(--key); }
code, .mono, svg text { font-family: var(--mono); font-size: 12.5px; }
code { overflow-wrap: anywhere; }
.sums { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 22px; }
.sums div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.sums b { display: block; font-size: 22px; line-height: 1.3; font-weight: 650; }
.sums span { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; }
.frame { border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 8px 12px; vertical-align: top; }
tr + tr { border-top: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
td.num { text-align: right; white-space: nowrap; }
td.mono { white-space: nowrap; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin: 12px 0; padding: 0 16px; }
details[open] { padding-bottom: 18px; }
summary { cursor: pointer; padding: 12px 0; font-weight: 600; overflow-wrap: anywhere; }
summary small { color: var(--soft); font-weight: 400; }
"""


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page, of parts in HTML, of which empty ones are left out; `style` is CSS for this page only."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body><main>",
            *(part for part in body if part),
            f"<footer>Made with quack-fx {escape(__version__)}.</footer>",
            "</main></body></html>",
            "",
        ]
    )


def sums(cards: Iterable[tuple[str, str]]) -> str:
    """A row of cards, each with a number above its label."""
    return (
        '<div class="sums">'
        + "".join(f"<div><b>{escape(n)}</b><span>{escape(t)}</span></div>" for n, t in cards)
        + "</div>"
    )
