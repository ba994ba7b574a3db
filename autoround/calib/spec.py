# SPDX-License-Identifier: Apache-2.0
"""The dataset mini-language: ``name:option:option, name:option ...``.

    pile-10k
    notes.jsonl:num=64, bundled
    chats.jsonl:system_prompt="Be brief, and kind: always."
    mbpp:split=train+test:concat

Items are separated by ``,`` and options by ``:``. A name or a value may be put in single or double
quotes; inside them ``,`` ``:`` and blanks are ordinary and a backslash takes the next character as
it is. Blanks at the ends of an unquoted value are dropped, those inside it are kept. Options belong
to their own item only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from autoround.errors import InputError

_QUOTES = "\"'"
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


@dataclass(frozen=True, slots=True)
class DatasetItem:
    """One dataset of a specification.

    ``num`` is the exact number of samples wanted from it, or None for an equal share of the rest;
    ``chat`` is True or False when the chat template was asked for or refused, None when the rows
    decide. ``str(item)`` is text that :func:`parse_dataset` reads back as the same item.
    """

    name: str
    num: int | None = None
    split: tuple[str, ...] = ()
    concat: bool = False
    chat: bool | None = None
    system_prompt: str | None = None

    def __str__(self) -> str:
        options = [quoted(self.name)]
        if self.num is not None:
            options.append(f"num={self.num}")
        if self.split:
            options.append("split=" + quoted("+".join(self.split)))
        if self.concat:
            options.append("concat")
        # A system prompt switches the template on by itself.
        if self.chat is not None and (self.system_prompt is None or not self.chat):
            options.append(f"apply_chat_template={str(self.chat).lower()}")
        if self.system_prompt is not None:
            options.append("system_prompt=" + quoted(self.system_prompt))
        return ":".join(options)


def quoted(value: str) -> str:
    """``value`` as it must be written in a specification: bare if that is unambiguous."""
    plain = value and value == value.strip() and value[0] not in _QUOTES
    if plain and not any(mark in value for mark in ",:="):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def parse_dataset(spec: str) -> list[DatasetItem]:
    """Read a dataset specification; raises InputError with the place and the remedy."""
    items = [_item(fields, spec) for fields in _Scanner(spec).items()]
    if not items:
        raise InputError(f"dataset {spec!r} is empty: name one, or leave the option out")
    return items


# --- splitting ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Field:
    """One ``key`` or ``key=value`` between separators; ``value`` is None without a ``=``."""

    key: str
    value: str | None


class _Scanner:
    """Walks over the specification once, minding quotes."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.at = 0

    def items(self) -> list[list[_Field]]:
        """The fields of every item."""
        items: list[list[_Field]] = [[]]
        while True:
            items[-1].append(self._field(name=not items[-1]))
            if self.at >= len(self.spec):
                return items
            if self.spec[self.at] == ",":
                items.append([])
            self.at += 1

    def _field(self, name: bool) -> _Field:
        # A name may hold "=" (a path can); only options are split there.
        key = self._text(",:" if name else ",:=")
        if self.at < len(self.spec) and self.spec[self.at] == "=":
            self.at += 1
            return _Field(key, self._text(",:"))
        return _Field(key, None)

    def _text(self, stops: str) -> str:
        while self.at < len(self.spec) and self.spec[self.at].isspace():
            self.at += 1
        if self.at < len(self.spec) and self.spec[self.at] in _QUOTES:
            return self._quoted(stops)
        start = self.at
        while self.at < len(self.spec) and self.spec[self.at] not in stops:
            self.at += 1
        return self.spec[start : self.at].strip()

    def _quoted(self, stops: str) -> str:
        quote, start = self.spec[self.at], self.at
        self.at += 1
        value: list[str] = []
        while self.at < len(self.spec) and self.spec[self.at] != quote:
            if self.spec[self.at] == "\\" and self.at + 1 < len(self.spec):
                self.at += 1
            value.append(self.spec[self.at])
            self.at += 1
        if self.at >= len(self.spec):
            raise InputError(
                f"dataset {self.spec!r}: the quote at character {start} is never closed"
            )
        self.at += 1
        while self.at < len(self.spec) and self.spec[self.at].isspace():
            self.at += 1
        if self.at < len(self.spec) and self.spec[self.at] not in stops:
            raise InputError(
                f"dataset {self.spec!r}: text follows the closing quote at character {self.at}: "
                "put the whole value in quotes"
            )
        return "".join(value)


# --- options ------------------------------------------------------------------------------------


def _item(fields: list[_Field], spec: str) -> DatasetItem:
    name = fields[0].key
    if not name:
        raise InputError(
            f"dataset {spec!r} has an item without a name: remove the stray ',' or ':'"
        )
    item, seen = DatasetItem(name), set[str]()
    for field in fields[1:]:
        apply = _OPTIONS.get(field.key)
        if apply is None:
            known = ", ".join(sorted(_OPTIONS))
            raise InputError(
                f"dataset option {field.key!r} in {spec!r} is unknown: use one of {known}, "
                "or put a value that holds ':' or ',' in quotes"
            )
        if field.key in seen:
            raise InputError(f"dataset option {field.key!r} is given twice in {spec!r}: keep one")
        seen.add(field.key)
        item = apply(item, field)
    if item.system_prompt is not None and item.chat is None:
        item = replace(item, chat=True)
    if item.system_prompt is not None and not item.chat:
        raise InputError(
            f"dataset {spec!r}: a system_prompt needs the chat template: "
            "drop apply_chat_template=false or the prompt"
        )
    return item


def _num(item: DatasetItem, field: _Field) -> DatasetItem:
    value = field.value or ""
    if not (value.isascii() and value.isdigit() and len(value) <= 9 and int(value) > 0):
        raise InputError(
            f"dataset option num={value!r} must be a whole number from 1, e.g. num=128"
        )
    return replace(item, num=int(value))


def _split(item: DatasetItem, field: _Field) -> DatasetItem:
    splits = tuple(part.strip() for part in (field.value or "").split("+"))
    if not all(splits):
        raise InputError(
            f"dataset option split={field.value!r} must name splits, e.g. split=train+test"
        )
    return replace(item, split=splits)


def _concat(item: DatasetItem, field: _Field) -> DatasetItem:
    return replace(item, concat=_truth(field))


def _chat(item: DatasetItem, field: _Field) -> DatasetItem:
    return replace(item, chat=_truth(field))


def _system_prompt(item: DatasetItem, field: _Field) -> DatasetItem:
    if not field.value:
        raise InputError('dataset option system_prompt needs text, e.g. system_prompt="Be brief."')
    return replace(item, system_prompt=field.value)


def _truth(field: _Field) -> bool:
    if field.value is None or field.value.lower() in _TRUE:
        return True
    if field.value.lower() in _FALSE:
        return False
    raise InputError(f"dataset option {field.key}={field.value!r} must be true or false")


_OPTIONS: dict[str, Callable[[DatasetItem, _Field], DatasetItem]] = {
    "num": _num,
    "split": _split,
    "concat": _concat,
    "apply_chat_template": _chat,
    "system_prompt": _system_prompt,
}
