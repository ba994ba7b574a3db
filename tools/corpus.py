# SPDX-License-Identifier: Apache-2.0
"""Permissively licensed text out of Debian packages, as clean documents with one shared split.

Two programs read this module: ``tools/build_packs.py`` (the calibration and held-out packs inside
the wheel) and ``benchmarks/models/train_pgdoc.py`` (the bundled test model). Both must agree on
which documents are held out, so the decision lives here, in :func:`role`, and nowhere else.

Nothing is installed: packages are fetched with ``apt-get download`` and opened with ``dpkg -x``.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools import readers

HELDOUT_ONE_IN = 16  # a document in this many is kept away from calibration and from training
NGRAM_WORDS = 13  # the usual contamination unit: 13 words in a row


@dataclass(frozen=True, slots=True)
class Document:
    """One whole page, source file or chapter; ``name`` is its path inside the package."""

    source: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where documents of one kind come from: globs inside one Debian package, and a reader."""

    name: str
    package: str
    licence: str
    notice: str
    root: str
    globs: tuple[str, ...]
    read: Callable[[Path], str]
    exclude: str = r"(?!)"  # regular expression over the path below root; default: nothing


# --- the table of sources -----------------------------------------------------------------------

_PY = "usr/lib/python3.11"
_GO = "usr/share/go-1.19/src"
_GO_FOLDERS = (
    *("net/http", "sort", "strings", "math", "bytes", "encoding/json", "fmt"),
    *("text/template", "go/parser", "compress/flate", "time", "io", "os"),
)
_APACHE = "usr/share/doc/apache2-doc/manual"
_PSF = "PSF-2.0"
_PSF_NOTICE = "Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved"
_GO_NOTICE = "Copyright (c) 2009 The Go Authors. All rights reserved."
_PY_EXCLUDE = (
    r"^(encodings|pydoc_data|lib2to3|idlelib|ensurepip|test|_sysconfigdata)|__phello__|"
    r"^(distutils/|turtledemo|this|antigravity|_pydecimal|_pyio|sre_|re/_casefix|keyword|token)"
)


def _apache_source(language: str) -> Source:
    return Source(
        name=f"apache-{language}",
        package="apache2-doc",
        licence="Apache-2.0",
        notice="Copyright 2022 The Apache Software Foundation",
        root=f"{_APACHE}/{language}",
        globs=("**/*.html",),
        read=readers.apache,
        exclude=r"quickreference|directives\.html|sitemap|license\.html|mod/index",
    )


SOURCES: tuple[Source, ...] = (
    Source(
        "postgresql",
        "postgresql-doc-15",
        "PostgreSQL",
        "Portions Copyright (c) 1996-2019, PostgreSQL Global Development Group; "
        "Portions Copyright (c) 1994, The Regents of the University of California",
        "usr/share/doc/postgresql-doc-15/html",
        ("*.html",),
        readers.html,
        r"bookindex|legalnotice|^index|biblio|acronyms|sql-keywords-appendix|features-sql-stand",
    ),
    Source(
        "python-doc",
        "python3.11-doc",
        _PSF,
        _PSF_NOTICE,
        "usr/share/doc/python3.11/html/_sources",
        ("**/*.rst.txt",),
        readers.rst,
        r"whatsnew/changelog|^contents|^license|^copyright|distutils/|^bugs",
    ),
    Source(
        "python-stdlib",
        "libpython3.11-stdlib",
        _PSF,
        _PSF_NOTICE,
        _PY,
        ("**/*.py",),
        readers.code,
        _PY_EXCLUDE,
    ),
    Source(
        "sqlite",
        "sqlite3-doc",
        "public domain",
        "The author disclaims copyright to this source code.",
        "usr/share/doc/sqlite3",
        ("*.html", "c3ref/*.html"),
        readers.html,
        r"matrix|keyword_index|doclist|^toc|sitemap|search|copyright|hlr|^requirements|pragma_|"
        r"changes\.html|capi3ref|_constlist|objlist|funclist",
    ),
    Source(
        "rust-book",
        "rust-doc",
        "MIT OR Apache-2.0",
        "Copyright 2006-2009 Graydon Hoare; 2009-2012 Mozilla Foundation; "
        "2012- The Rust Project Developers",
        "usr/share/doc/rust-doc/html",
        ("book/*.html", "reference/**/*.html", "nomicon/*.html", "rust-by-example/**/*.html"),
        readers.html,
        r"print\.html|/index\.html|title-page|toc\.html",
    ),
    Source(
        "go-src",
        "golang-1.19-src",
        "BSD-3-Clause",
        _GO_NOTICE,
        _GO,
        tuple(f"{folder}/*.go" for folder in _GO_FOLDERS),
        readers.code,
        r"_test\.go|_string\.go|tables|bundle|zsys|zoneinfo_abbrs|_js\.go|plan9|_windows|example",
    ),
    Source(
        "nodejs",
        "nodejs-doc",
        "MIT",
        "Copyright Node.js contributors; Joyent, Inc. and other Node contributors",
        "usr/share/doc/nodejs/api",
        ("*.md.gz", "*.md"),
        readers.plain,
        r"^index|documentation|all\.md",
    ),
    Source(
        "nodejs-json",
        "nodejs-doc",
        "MIT",
        "Copyright Node.js contributors; Joyent, Inc. and other Node contributors",
        "usr/share/doc/nodejs/api",
        ("dns.json.gz", "querystring.json.gz", "path.json.gz", "zlib.json.gz", "v8.json.gz"),
        readers.plain,
    ),
    Source(
        "sympy-maths",
        "python-sympy-doc",
        "BSD-3-Clause",
        "Copyright (c) 2006-2014 SymPy Development Team",
        "usr/share/doc/python-sympy-doc/html/_sources",
        ("**/*.rst.txt", "**/*.md.txt"),
        readers.rst,
        r"^modules/parsing|^index|contents|aboutus",
    ),
    Source(
        "devils-dictionary",
        "dict-devil",
        "public domain",
        "The Devil's Dictionary, Ambrose Bierce (1911), copyright expired",
        "usr/share/dictd",
        ("devil.dict.dz",),
        readers.dictd,
    ),
    Source(
        "jargon-file",
        "dict-jargon",
        "public domain",
        "Jargon File 4.4.7, 29 Dec 2003 (public domain)",
        "usr/share/dictd",
        ("jargon.dict.dz",),
        readers.dictd,
    ),
    Source(
        "newton-opticks",
        "golang-1.19-src",
        "public domain",
        "Opticks, Isaac Newton, 4th edition (1730), copyright expired",
        f"{_GO}/testdata",
        ("Isaac.Newton-Opticks.txt",),
        readers.gutenberg,
    ),
    *map(_apache_source, ("en", "fr", "de", "es", "ja", "ko", "zh-cn", "pt-br", "tr")),
)

_BOOKS = frozenset({"devils-dictionary", "jargon-file", "newton-opticks"})
_CHAPTER_CHARS = 12_000


# --- collecting ---------------------------------------------------------------------------------


def fetch(sources: Iterable[Source], workdir: Path) -> dict[str, str]:
    """Download and unpack every package once; returns package -> version."""
    workdir.mkdir(parents=True, exist_ok=True)
    versions: dict[str, str] = {}
    for package in sorted({source.package for source in sources}):
        debs = sorted(workdir.glob(f"{package}_*.deb"))
        if not debs:
            subprocess.run(["apt-get", "download", package], cwd=workdir, check=True)
            debs = sorted(workdir.glob(f"{package}_*.deb"))
        target = workdir / "x" / package
        if not target.is_dir():
            target.mkdir(parents=True)
            subprocess.run(["dpkg", "-x", str(debs[-1]), str(target)], check=True)
        show = ["dpkg-deb", "--field", str(debs[-1]), "Version"]
        versions[package] = subprocess.run(
            show, check=True, capture_output=True, text=True
        ).stdout.strip()
    return versions


def documents(source: Source, workdir: Path) -> Iterator[Document]:
    """Every document of one source in name order; long books come as chapters."""
    root = workdir / "x" / source.package / source.root
    paths = {path for pattern in source.globs for path in root.glob(pattern)}
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() or not path.is_file() or re.search(source.exclude, name):
            continue
        text = source.read(path)
        if source.name in _BOOKS:
            yield from _chapters(source.name, name, text)
        elif len(text) >= 400:  # shorter pages are redirects and stubs
            yield Document(source.name, name, text)


def _chapters(source: str, name: str, text: str) -> Iterator[Document]:
    for index, chapter in enumerate(split_text(text, _CHAPTER_CHARS)):
        yield Document(source, f"{name}#{index:03d}", chapter)


def split_text(text: str, limit: int) -> list[str]:
    """Cut at paragraph ends into pieces of at least ``limit`` characters (the last may be less)."""
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    for paragraph in re.split(r"(?<=\n)\n", text):
        current.append(paragraph)
        size += len(paragraph) + 1
        if size >= limit:
            pieces.append("\n".join(current))
            current, size = [], 0
    if current:
        pieces.append("\n".join(current))
    return pieces


def role(document: Document) -> str:
    """``"heldout"`` or ``"open"``, decided by the document's identity alone."""
    key = f"{document.source}/{document.name}".encode()
    bucket = int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % HELDOUT_ONE_IN
    return "heldout" if bucket == 0 else "open"


def ngrams(text: str) -> Iterator[int]:
    """64-bit hashes of every run of 13 words (case and punctuation ignored)."""
    words = re.findall(r"\w+", text.lower())
    for start in range(len(words) - NGRAM_WORDS + 1):
        digest = hashlib.blake2b(
            " ".join(words[start : start + NGRAM_WORDS]).encode(), digest_size=8
        )
        yield int.from_bytes(digest.digest(), "big")
