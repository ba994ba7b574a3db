# SPDX-License-Identifier: Apache-2.0
"""Build the text packs of ``autoround/calib/pack`` from Debian documentation packages.

    python -m tools.build_packs --workdir build/docs

Writes ``calibration.jsonl.xz`` and ``heldout.jsonl.xz`` (rows ``{"source", "text"}``), the digests
the package verifies (``digests.py``) and ``PROVENANCE.md``. The same package versions give the same
bytes: selection and order depend on document names alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tools.corpus import (
    NGRAM_WORDS,
    SOURCES,
    Document,
    Source,
    documents,
    fetch,
    ngrams,
    role,
    split_text,
)

PACK = Path("autoround/calib/pack")
CALIBRATION_PIECE = 11_000  # characters: comfortably over 2048 tokens of English
HELDOUT_PIECE = 7_000
LONG_LINE = 60  # a line this long that also occurs in an open document is a copy, not a coincidence

# Characters of each source in the calibration pack: about half documentation, a fifth code,
# a sixth old prose, the rest other languages, mathematics and JSON.
CALIBRATION_CHARS = {
    "postgresql": 1_000_000,
    "python-doc": 1_000_000,
    "python-stdlib": 1_000_000,
    "sqlite": 700_000,
    "rust-book": 800_000,
    "go-src": 500_000,
    "nodejs": 500_000,
    "nodejs-json": 120_000,
    "sympy-maths": 600_000,
    "devils-dictionary": 300_000,
    "jargon-file": 500_000,
    "newton-opticks": 450_000,
    "apache-en": 250_000,
    "apache-fr": 350_000,
    "apache-de": 200_000,
    "apache-es": 250_000,
    "apache-ja": 250_000,
    "apache-ko": 150_000,
    "apache-zh-cn": 10_000,
    "apache-pt-br": 20_000,
    "apache-tr": 250_000,
}
HELDOUT_CHARS = {
    "postgresql": 110_000,
    "python-doc": 60_000,
    "python-stdlib": 35_000,
    "sqlite": 30_000,
    "rust-book": 25_000,
    "go-src": 15_000,
    "nodejs": 15_000,
    "sympy-maths": 20_000,
    "jargon-file": 20_000,
    "newton-opticks": 25_000,
    "apache-en": 10_000,
    "apache-fr": 20_000,
}


@dataclass(frozen=True, slots=True)
class Piece:
    """What goes into a pack: one run of paragraphs of one document."""

    source: str
    document: str
    text: str


def in_hash_order(docs: Iterable[Document]) -> list[Document]:
    """A fixed order without any relation to names or sizes."""
    return sorted(
        docs, key=lambda d: hashlib.sha256(f"order/{d.source}/{d.name}".encode()).digest()
    )


def cut(document: Document, size: int, most: int) -> list[Piece]:
    """Up to ``most`` pieces of about ``size`` characters, from the start of the document."""
    texts = split_text(document.text, size)[:most]
    # One paragraph can be a huge table or listing: keep its beginning, up to a line end.
    texts = [
        text if len(text) <= 2 * size else text[: text.rfind("\n", 0, 2 * size) + 1]
        for text in texts
    ]
    return [Piece(document.source, document.name, text) for text in texts if len(text) > 200]


def choose(docs: list[Document], budget: int, size: int, most: int) -> list[Piece]:
    """Whole pieces in hash order until the budget of characters is used up."""
    chosen: list[Piece] = []
    used = 0
    for document in in_hash_order(docs):
        for piece in cut(document, size, most):
            if used + len(piece.text) > budget:
                continue
            chosen.append(piece)
            used += len(piece.text)
    return chosen


def interleave(groups: list[list[Piece]]) -> list[Piece]:
    """Every prefix of the pack holds its sources in about their final proportions."""
    keyed = [
        ((index + 0.5) / len(group), number, piece)
        for number, group in enumerate(groups)
        for index, piece in enumerate(group)
    ]
    return [piece for _, _, piece in sorted(keyed, key=lambda entry: entry[:2])]


# --- keeping the two sides apart ----------------------------------------------------------------


def long_lines(text: str) -> set[str]:
    """Stripped lines of LONG_LINE characters or more: also catches scripts without word spaces."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE}


def shared_marks(heldout: list[Piece], everything: Iterable[Document]) -> tuple[set[int], set[str]]:
    """(13-word runs, long lines) of the held-out side that also occur in an open document."""
    grams = {gram for piece in heldout for gram in ngrams(piece.text)}
    lines = {line for piece in heldout for line in long_lines(piece.text)}
    seen_grams: set[int] = set()
    seen_lines: set[str] = set()
    for document in everything:
        seen_grams.update(grams.intersection(ngrams(document.text)))
        seen_lines.update(lines.intersection(long_lines(document.text)))
    return seen_grams, seen_lines


def without_shared(text: str, grams: set[int], lines: set[str]) -> str:
    """``text`` less every paragraph that holds a shared line or the middle of a shared run."""
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if lines.isdisjoint(long_lines(p))]
    while True:
        owners = [
            index for index, p in enumerate(paragraphs) for _ in re.findall(r"\w+", p.lower())
        ]
        text = "\n\n".join(paragraphs)
        bad = {
            owners[start + NGRAM_WORDS // 2]
            for start, gram in enumerate(ngrams(text))
            if gram in grams
        }
        if not bad:
            return text.strip("\n") + "\n"
        paragraphs = [p for index, p in enumerate(paragraphs) if index not in bad]


def clean_heldout(pieces: list[Piece], everything: Iterable[Document]) -> list[Piece]:
    """Held-out pieces that share nothing with any open document; stubs of what is left go too."""
    grams, lines = shared_marks(pieces, everything)
    cleaned = [Piece(p.source, p.document, without_shared(p.text, grams, lines)) for p in pieces]
    # Removing a paragraph joins its neighbours, which can make a run that was not there before.
    again, _ = shared_marks(cleaned, everything)
    cleaned = [Piece(p.source, p.document, without_shared(p.text, again, set())) for p in cleaned]
    return [piece for piece in cleaned if len(piece.text) >= 1_000]


# --- writing ------------------------------------------------------------------------------------


def encode(pieces: list[Piece]) -> bytes:
    """The pack before compression: one JSON object a line, keys sorted."""
    rows = (
        json.dumps({"source": p.source, "text": p.text}, ensure_ascii=False, sort_keys=True)
        for p in pieces
    )
    return "".join(row + "\n" for row in rows).encode()


def write_pack(name: str, pieces: list[Piece]) -> str:
    """Compress and write one pack; returns the sha256 of the uncompressed rows."""
    raw = encode(pieces)
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    (PACK / f"{name}.jsonl.xz").write_bytes(packed)
    print(f"{name}: {len(pieces)} rows, {len(raw):,} bytes raw, {len(packed):,} compressed")
    return hashlib.sha256(raw).hexdigest()


def write_digests(digests: dict[str, str]) -> None:
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        '"""sha256 of the uncompressed packs; written by ``tools/build_packs.py``."""',
        "",
        *(f'{name.upper()}_SHA256 = "{digest}"' for name, digest in digests.items()),
    ]
    (PACK / "digests.py").write_text("\n".join(lines) + "\n")


def table(pieces: list[Piece], versions: dict[str, str]) -> str:
    """Markdown rows: source, package and version, licence, pieces, bytes, share."""
    sizes = Counter[str]()
    for piece in pieces:
        sizes[piece.source] += len(piece.text.encode())
    counts = Counter(piece.source for piece in pieces)
    total = sum(sizes.values())
    rows = [
        f"| {s.name} | `{s.package}` {versions[s.package]} | {s.licence} | {counts[s.name]} "
        f"| {sizes[s.name]:,} | {100 * sizes[s.name] / total:.1f} % |"
        for s in SOURCES
        if counts[s.name]
    ]
    head = "| source | Debian package, version | licence | rows | bytes | share |"
    rule = "|---|---|---|--:|--:|--:|"
    return "\n".join([head, rule, *rows, f"| **total** | | | {len(pieces)} | {total:,} | |"])


def write_provenance(
    calibration: list[Piece],
    heldout: list[Piece],
    versions: dict[str, str],
    digests: dict[str, str],
) -> None:
    notices = "\n".join(f"- **{s.name}** ({s.licence}): {s.notice}" for s in SOURCES)
    text = f"""# Where the text packs come from

Built by `python -m tools.build_packs` from Debian 12 documentation packages; nothing else went in.
Pages were turned into plain text; navigation, licence headers and stubs were left out.

Documents are divided once, by name (`tools.corpus.role`): one in {16} is *held out*, and no
held-out document is in the calibration pack or in the training text of `benchmarks/models/pgdoc`.
From the held-out text every paragraph was removed that shares a run of {NGRAM_WORDS} words, or a
line of {LONG_LINE} characters, with **any** document on the other side.
`tests/autoround/test_calib.py` checks the result.

## calibration.jsonl.xz

sha256 of the uncompressed rows: `{digests["calibration"]}`

{table(calibration, versions)}

## heldout.jsonl.xz

sha256 of the uncompressed rows: `{digests["heldout"]}`

{table(heldout, versions)}

## Notices

The texts keep their own licences; the Apache-2.0 licence of this repository does not replace them.
Full licence texts: `/usr/share/doc/<package>/copyright` of each Debian package.

{notices}
"""
    (PACK / "PROVENANCE.md").write_text(text)


def select(by_source: dict[Source, list[Document]]) -> tuple[list[Piece], list[Piece]]:
    """(calibration, held-out before cleaning), each interleaved over its sources."""
    calibration, heldout = [], []
    for source, docs in by_source.items():
        open_docs = [d for d in docs if role(d) == "open"]
        held_docs = [d for d in docs if role(d) == "heldout"]
        wanted = CALIBRATION_CHARS.get(source.name, 0)
        calibration.append(choose(open_docs, wanted, CALIBRATION_PIECE, most=2))
        heldout.append(choose(held_docs, HELDOUT_CHARS.get(source.name, 0), HELDOUT_PIECE, most=2))
    return interleave(calibration), interleave(heldout)


def main() -> None:
    """Command line; run from the repository root."""
    parser = argparse.ArgumentParser(description="build the calibration and held-out text packs")
    parser.add_argument("--workdir", type=Path, default=Path("build/docs"))
    args = parser.parse_args()
    versions = fetch(SOURCES, args.workdir)
    by_source = {source: list(documents(source, args.workdir)) for source in SOURCES}
    calibration, heldout = select(by_source)
    open_docs = [d for docs in by_source.values() for d in docs if role(d) == "open"]
    heldout = clean_heldout(heldout, open_docs)
    digests = {
        "calibration": write_pack("calibration", calibration),
        "heldout": write_pack("heldout", heldout),
    }
    write_digests(digests)
    write_provenance(calibration, heldout, versions, digests)


if __name__ == "__main__":
    main()
