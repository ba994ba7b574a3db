# SPDX-License-Identifier: Apache-2.0
"""Readers for ``tools.corpus``: one file of a documentation package to clean text."""

from __future__ import annotations

import gzip
import re
from html.parser import HTMLParser
from pathlib import Path

_BLOCK = frozenset(
    {"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "dl", "dt", "dd"}
    | {"table", "tr", "pre", "blockquote", "section", "hr", "br", "main"}
)
_SKIP_TAGS = frozenset({"script", "style", "head", "nav", "button", "svg", "form"})
_SKIP_CLASSES = frozenset(
    {"navheader", "navfooter", "toc", "nosearch", "fancy_toc", "sidebar", "menu", "footer"}
    | {"toplang", "bottomlang", "nav-chapters", "nav-wrapper", "indexterm", "related"}
    | {"sphinxsidebar", "headerlink", "topheader"}
)
_SKIP_IDS = frozenset(
    {"page-header", "path", "quickview", "footer", "comments_section", "menu-bar", "sidebar"}
    | {"toc", "menu"}
)


class _TextFromHtml(HTMLParser):
    """Collects readable text; keeps ``<pre>`` as it is, drops navigation and scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._pre = 0
        self._skip_tag = ""
        self._skip_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skip_depth:
            self._skip_depth += tag == self._skip_tag
            return
        values = {key: value or "" for key, value in attrs}
        if self._is_chrome(tag, values):
            self._skip_tag, self._skip_depth = tag, 1
        elif tag == "pre":
            self._pre += 1
            self.parts.append("\n\n")
        elif tag in ("td", "th"):
            self.parts.append("  ")
        elif tag in _BLOCK:
            self.parts.append("\n" if tag in ("li", "tr", "br", "dd") else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self._skip_depth:
            self._skip_depth -= tag == self._skip_tag
        elif tag == "pre":
            self._pre = max(0, self._pre - 1)
            self.parts.append("\n\n")
        elif tag in _BLOCK:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skip_depth:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))

    @staticmethod
    def _is_chrome(tag: str, values: dict[str, str]) -> bool:
        if tag in _SKIP_TAGS:
            return True
        # Void tags never close, so they must not open a skipped region.
        if tag in ("a", "img", "br", "hr", "input", "link", "meta"):
            return False
        return values.get("id") in _SKIP_IDS or not _SKIP_CLASSES.isdisjoint(
            values.get("class", "").split()
        )


def _tidy(text: str) -> str:
    """No trailing blanks, at most one empty line in a row, one newline at the end."""
    lines = [line.rstrip() for line in text.replace("\t", "    ").splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def plain(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return _tidy(raw.decode("utf-8", errors="ignore"))


def html(path: Path) -> str:
    parser = _TextFromHtml()
    parser.feed(path.read_text("utf-8", errors="ignore"))
    parser.close()
    lines = "".join(parser.parts).splitlines()
    return _tidy("\n".join(line if line.startswith("    ") else line.strip() for line in lines))


def apache(path: Path) -> str:
    """A manual page in its folder's language; the folders also hold English copies: skip those."""
    head = path.read_text("utf-8", errors="ignore")[:400]
    return html(path) if f'lang="{_language(path)}"' in head else ""


def _language(path: Path) -> str:
    parts = path.parts
    return parts[parts.index("manual") + 1]


def rst(path: Path) -> str:
    """A reStructuredText source without its comments and index directives."""
    return _tidy(re.sub(r"(?m)^\.\. (?:index::|_[^\n]*:\s*$|\w+author::)[^\n]*\n", "", plain(path)))


def code(path: Path) -> str:
    """A source file without its leading licence comment (the same on every file)."""
    return _tidy(re.sub(r"\A(?:(?://|#)[^\n]*\n)+", "", plain(path)))


def dictd(path: Path) -> str:
    """A dictd data file: plain text behind its bibliographic entries."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
    marks = ("PREFACE", "(TM)")
    start = min((text.find(mark) for mark in marks if mark in text), default=0)
    return _tidy(text[start:])


def gutenberg(path: Path) -> str:
    text = path.read_text("utf-8", errors="ignore")
    start = text.find("LONDON:")
    end = text.find("End of the Project Gutenberg")
    return _tidy(text[max(start, 0) : end if end > 0 else None])
