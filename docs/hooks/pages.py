"""What the site adds to the Markdown files, as a hook of mkdocs.

In: the pages of docs/. Out: the same pages, with
- reference text in place of `<!-- reference: commands -->` (see reference.py),
- a section of another file in place of `<!-- section: README.md, Limits -->`,
- every file of the repository that a page links to as a page of its own, so that no link leaves the site,
- pictures as part of the page, so that they take its colours, and formulas as MathML, which browsers know how to set.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

import reference
from latex2mathml.converter import convert as mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(
    r"(?P<code>^(?P<fence>`{3,})[^\n]*\n.*?^(?P=fence)$|`[^`\n]*`)"  # what looks like a link there is code
    r"|\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)",
    re.DOTALL | re.MULTILINE,
)
MARKS: dict[str, Callable[[str], str]] = {
    "reference": lambda name: str(getattr(reference, name)()),
    "section": lambda where: _section(*where.split(", ")),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that a page links to, and for those that these link to."""
    queue = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    known = set(queue)
    for path in queue:
        for link in LINK.finditer(_with_marks(_text(path), path)):
            if link["code"]:
                continue
            linked = _resolve(path, link["target"])
            if linked in known or linked.startswith("docs/"):
                continue
            if not (ROOT / linked).is_file():
                raise PluginError(f"{path} links to {link['target']}, which is no file of the repository")
            known.add(linked)
            queue.append(linked)
            files.append(File.generated(config, _page_of(linked), content=_text(linked)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its marks filled in and its links turned to pages of the site."""
    path = _path_of(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)
    markdown = _with_marks(markdown, path)
    return _relinked(markdown, lambda target: posixpath.relpath(_page_of(_resolve(path, target)), here or "."))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's HTML with pictures drawn in it and formulas set."""
    content = re.sub(r'<p><img alt="([^"]*)" src="[^"]*?(pictures/[\w-]+\.svg)" ?/?></p>', _drawn, content)
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _set, content, flags=re.DOTALL)


def _drawn(match: re.Match[str]) -> str:
    text, name = match.groups()
    svg = (ROOT / "docs" / name).read_text("utf-8")
    return f'<figure class="drawing" role="img" aria-label="{text}">{svg}</figure>'


def _set(match: re.Match[str]) -> str:
    tag, formula = match.groups()
    display = "block" if tag == "div" else "inline"
    return str(mathml(html.unescape(formula).strip(), display=display))


def _with_marks(markdown: str, path: str) -> str:
    """Markdown with its marks filled in; links of what comes from elsewhere are those of the file at `path`."""

    def filled(match: re.Match[str]) -> str:
        kind, what = match.groups()
        text = MARKS[kind](what)
        if kind == "reference":
            return text
        source, here = what.split(", ")[0], posixpath.dirname(path)
        return _relinked(text, lambda target: posixpath.relpath(_resolve(source, target), here or "."))

    return re.sub(rf"<!-- ({'|'.join(MARKS)}): (.*?) -->", filled, markdown)


def _relinked(markdown: str, turn: Callable[[str], str]) -> str:
    """Markdown with the target of each link within the repository turned to another."""

    def turned(link: re.Match[str]) -> str:
        if link["code"]:
            return link[0]
        return f"[{link['text']}]({turn(link['target'])}{link['anchor'] or ''})"

    return LINK.sub(turned, markdown)


def _section(name: str, title: str) -> str:
    """What stands under a heading of a file, up to the next one of its rank."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", _text(name), re.DOTALL | re.MULTILINE)
    if found is None:
        raise PluginError(f"{name} has no section {title!r}")
    return found[2].strip()


def _text(path: str) -> str:
    """A file of the repository as Markdown: as it is, or as one block of code."""
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n````{Path(path).suffix.lstrip('.')}\n{text}````\n"


def _resolve(path: str, target: str) -> str:
    """The file of the repository that a link in another one means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _page_of(path: str) -> str:
    """Where a file of the repository lies in the site; code has a page made for it."""
    name = path.removeprefix("docs/")
    return name if name.endswith(".md") or path.startswith("docs/") else f"{name}.md"


def _path_of(page: str) -> str:
    """The file of the repository that a page of the site shows."""
    if (ROOT / "docs" / page).exists():
        return f"docs/{page}"
    return page if (ROOT / page).exists() else page.removesuffix(".md")
