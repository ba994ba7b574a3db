# SPDX-License-Identifier: Apache-2.0
"""Calibration data: from what the user named to a block of token ids.

``load_tokens`` is the whole interface. It reads the named datasets lazily, in an order decided by
the seed, and stops as soon as there are enough tokens.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoround.calib import hub, pack
from autoround.calib.files import check_file, is_file_name, read_file
from autoround.calib.packing import Packer
from autoround.calib.rows import Renderer, Text
from autoround.calib.spec import DatasetItem, parse_dataset
from autoround.errors import InputError, blamed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DatasetItem", "TokenSet", "load_tokens", "parse_dataset"]

_BUNDLED = frozenset({"bundled", "default"})
_TOKENIZE_BATCH = 32
# No tokenizer puts more than this many characters into a token on average, so a longer text
# (a whole book, a scraped site) cannot all be needed and is not tokenized to its end.
_CHARS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class TokenSet:
    """Calibration samples.

    ``ids`` is int64 [S, L] without padding; ``description`` says for the log what was used;
    ``digest`` is the sha256 of shape and ids, for provenance and for the resume signature.
    """

    ids: Tensor
    description: str
    digest: str


@dataclass(frozen=True, slots=True)
class _Wish:
    """The size of the result and the seed of every choice."""

    nsamples: int
    seqlen: int
    seed: int


class _Feed:
    """One dataset item: its documents, read on demand into its own packer."""

    def __init__(self, item: DatasetItem, label: str, documents: Iterator[_Tokens], seqlen: int):
        self.item = item
        self.label = label
        self.packer = Packer(seqlen, item.concat)
        self.target = 0
        self._documents = documents

    def fill(self, target: int) -> None:
        """Try to hold ``target`` rows; holds fewer only when the dataset is used up."""
        self.target = target
        while len(self.packer.rows) < target:
            document = next(self._documents, None)
            if document is None:
                self.packer.use_spare(target)
                return
            self.packer.add(document.ids, document.close)

    @property
    def rows(self) -> list[list[int]]:
        return self.packer.rows[: self.target]

    def describe(self) -> str:
        return f"{self.label}: {len(self.rows)} samples ({self.packer.summary()})"


@dataclass(frozen=True, slots=True)
class _Tokens:
    """One tokenized document and the token that closes it where documents are joined."""

    ids: list[int]
    close: int | None


def load_tokens(
    dataset: str | Iterable[Any] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
) -> TokenSet:
    """``nsamples`` rows of exactly ``seqlen`` token ids.

    ``dataset``: None, "default" or "bundled" for the text inside the package; a specification in
    the language of :mod:`autoround.calib.spec`; a path; or Python objects (a list of texts or of
    token ids, a tensor, a DataLoader, any iterable of the rows of :mod:`autoround.calib.rows`).
    Sequences are shuffled by ``seed``; other iterables are taken in their own order.

    Documents of at least ``seqlen`` tokens give one row each; shorter ones are joined, closed by
    EOS, and cut to rows. If that is not enough, the ends of the long ones are used as well.

    Raises InputError for anything that cannot be read, and when there are too few tokens.
    """
    if nsamples < 1 or seqlen < 2:
        raise InputError(f"nsamples={nsamples}, seqlen={seqlen}: use at least 1 sample of 2 tokens")
    wish = _Wish(nsamples, seqlen, seed)
    feeds = _feeds(dataset, tokenizer, wish)
    _fill(feeds, wish)
    rows = [row for feed in feeds for row in feed.rows]
    if len(rows) < nsamples:
        raise _too_few(feeds, wish)
    random.Random(seed).shuffle(rows)
    ids = torch.tensor(rows, dtype=torch.int64)
    description = f"{nsamples} x {seqlen} tokens from " + "; ".join(f.describe() for f in feeds)
    return TokenSet(ids, description, _digest(ids))


def _digest(ids: Tensor) -> str:
    content = f"{tuple(ids.shape)}int64".encode() + ids.contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(content).hexdigest()


# --- where rows come from -----------------------------------------------------------------------


def _feeds(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, wish: _Wish) -> list[_Feed]:
    if dataset is None:
        dataset = "bundled"
    if isinstance(dataset, os.PathLike):
        items = [DatasetItem(os.fspath(dataset))]
    elif isinstance(dataset, str):
        items = parse_dataset(dataset)
    else:
        item = DatasetItem(f"Python {type(dataset).__name__}")
        return [_feed(item, item.name, _object_rows(dataset, wish.seed), tokenizer, wish)]
    _check_counts(items, wish.nsamples)
    for item in items:  # every name before the first byte is read or downloaded
        _check_name(item)
    return [_feed(item, *_named_rows(item, wish.seed), tokenizer, wish) for item in items]


def _feed(
    item: DatasetItem,
    label: str,
    rows: Iterator[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    wish: _Wish,
) -> _Feed:
    return _Feed(item, label, _tokenized(item, rows, tokenizer, wish), wish.seqlen)


def _check_name(item: DatasetItem) -> None:
    bundled = item.name.lower() in _BUNDLED
    if not bundled and not is_file_name(item.name):
        hub.resolve(item.name, item.split)
        return
    if not bundled:
        check_file(Path(item.name))
    if item.split:
        splits = "+".join(item.split)
        raise InputError(f"dataset {item.name!r} has no splits: remove split={splits}")


def _named_rows(item: DatasetItem, seed: int) -> tuple[str, Iterator[Any]]:
    """(name for the log, rows) of one item."""
    if item.name.lower() in _BUNDLED:
        return f"bundled text (sha256 {pack.CALIBRATION_SHA256[:12]})", _bundled_rows(seed)
    if is_file_name(item.name):
        return item.name, _shuffled(read_file(Path(item.name)), seed)
    return item.name, hub.rows(item.name, item.split, seed)


def _bundled_rows(seed: int) -> Iterator[str]:
    """The bundled texts so ordered that any first n of them mix the sources in proportion."""
    rng = random.Random(seed)
    groups: dict[str, list[str]] = {}
    for row in pack.rows("calibration"):
        groups.setdefault(row.source, []).append(row.text)
    keyed: list[tuple[float, str]] = []
    for texts in groups.values():
        rng.shuffle(texts)
        # Systematic sampling: evenly spaced places, a random start for each source.
        start = rng.random()
        keyed.extend(((index + start) / len(texts), text) for index, text in enumerate(texts))
    return (text for _, text in sorted(keyed))


def _object_rows(dataset: Any, seed: int) -> Iterator[Any]:
    """Rows of a Python object: sequences shuffled, other iterables as they come."""
    if isinstance(dataset, Mapping):
        return iter([dataset])
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return _shuffled(dataset, seed)
    if not isinstance(dataset, Iterable):
        raise InputError(
            f"dataset of type {type(dataset).__name__} cannot be iterated: "
            "give a name, a path, a list or a DataLoader"
        )
    return iter(dataset)


def _shuffled(rows: Any, seed: int) -> Iterator[Any]:
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return (rows[index] for index in order)


# --- tokenizing ---------------------------------------------------------------------------------


def _tokenized(
    item: DatasetItem, rows: Iterator[Any], tokenizer: PreTrainedTokenizerBase | None, wish: _Wish
) -> Iterator[_Tokens]:
    """Documents as token ids, texts in batches because fast tokenizers are threaded."""
    renderer = Renderer(item, tokenizer)
    rendered = chain.from_iterable(
        renderer.documents(row, f"row {index} of {item.name}") for index, row in enumerate(rows)
    )
    limit = _CHARS_PER_TOKEN * wish.seqlen * wish.nsamples
    while batch := list(islice(rendered, _TOKENIZE_BATCH)):
        texts = [document for document in batch if isinstance(document, Text)]
        tokens = iter(_tokenize(texts, tokenizer, limit, item))
        for document in batch:
            yield next(tokens) if isinstance(document, Text) else _Tokens(document, None)


def _tokenize(
    texts: list[Text], tokenizer: PreTrainedTokenizerBase | None, limit: int, item: DatasetItem
) -> list[_Tokens]:
    """One entry per text. Templated text brings its own special tokens and is not closed."""
    if not texts:
        return []
    if tokenizer is None:
        raise InputError(
            f"dataset {item.name!r} is text and there is no tokenizer: "
            "pass the model's tokenizer, or a dataset of input_ids"
        )
    found: list[_Tokens | None] = [None] * len(texts)
    for templated in (False, True):
        places = [index for index, text in enumerate(texts) if text.templated == templated]
        if not places:
            continue
        with blamed(  # half characters, or a tokenizer whose settings are broken
            f"dataset {item.name!r}: the tokenizer refused the text",
            "check that it is whole text, and the model's tokenizer.json and tokenizer_config.json",
        ):
            encoded: Any = tokenizer(
                [texts[index].text[:limit] for index in places],
                add_special_tokens=not templated,
                return_attention_mask=False,
                verbose=False,  # longer than the model's context is what we expect here
            )
        close = None if templated else _eos(tokenizer)
        for index, ids in zip(places, encoded["input_ids"], strict=True):
            # A text of nothing but the tokenizer's own BOS/EOS is an empty row.
            found[index] = _Tokens(list(ids) if texts[index].text else [], close)
    return [entry for entry in found if entry is not None]


def _eos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    eos: Any = getattr(tokenizer, "eos_token_id", None)
    return eos if isinstance(eos, int) else None


# --- sharing ------------------------------------------------------------------------------------


def _check_counts(items: list[DatasetItem], nsamples: int) -> None:
    """num= must leave a place for every other item, and fill the set when there is none."""
    fixed = sum(item.num or 0 for item in items)
    free = sum(item.num is None for item in items)
    if fixed + free > nsamples or (not free and fixed != nsamples):
        raise InputError(
            f"num= adds up to {fixed} with {free} other datasets and nsamples is {nsamples}: "
            f"use --nsamples {fixed + free} or change num="
        )


def _fill(feeds: list[_Feed], wish: _Wish) -> None:
    """``num`` items first, the rest in equal shares; what one cannot give, the others do."""
    fixed = [feed for feed in feeds if feed.item.num is not None]
    free = [feed for feed in feeds if feed.item.num is None]
    for feed in fixed:
        feed.fill(feed.item.num or 0)
    while free:
        missing = wish.nsamples - sum(len(feed.rows) for feed in feeds)
        if missing <= 0:
            return
        share, extra = divmod(missing, len(free))
        for index, feed in enumerate(free):
            feed.fill(feed.target + share + (index < extra))
        free = [feed for feed in free if len(feed.rows) == feed.target]


def _too_few(feeds: list[_Feed], wish: _Wish) -> InputError:
    """How much there was and what would fit; what fell short has been read to its end by now."""
    got = sum(len(feed.rows) for feed in feeds)
    tokens = sum(feed.packer.tokens for feed in feeds)
    documents = sum(feed.packer.documents for feed in feeds)

    def fits(seqlen: int) -> bool:
        return sum(_capacity(feed, seqlen) for feed in feeds) >= wish.nsamples

    shorter = next((n for n in _round_lengths(wish.seqlen) if fits(n)), None)
    remedies = [f"--seqlen {shorter}"] * (shorter is not None) + [f"--nsamples {got}"] * (got > 0)
    advice = f"use {' or '.join(remedies)}, or a larger dataset" if remedies else "use a larger one"
    dropped = sum(feed.packer.dropped for feed in feeds)
    if dropped > got:  # text that a tokenizer does not know becomes <unk> <unk> <unk>
        advice = "check that this tokenizer fits this text, and the text itself"
    note = f", {dropped} samples dropped as one repeated token" if dropped else ""
    names = ", ".join(feed.item.name for feed in feeds)
    return InputError(
        f"dataset {names!r} gives {got} samples of {wish.seqlen} tokens ({tokens} tokens in "
        f"{documents} documents{note}) and {wish.nsamples} were asked for: {advice}"
    )


def _capacity(feed: _Feed, seqlen: int) -> int:
    rows = (feed.packer.tokens - feed.packer.dropped * feed.packer.seqlen) // seqlen
    return rows if feed.item.num is None else min(rows, feed.item.num)


def _round_lengths(seqlen: int) -> Iterator[int]:
    """Powers of two below ``seqlen``, largest first, down to 32."""
    return (1 << power for power in range(30, 4, -1) if 1 << power < seqlen)
