# SPDX-License-Identifier: Apache-2.0
"""Regular expressions that come out of files: Python's syntax, matched without backtracking.

`re` tries one way after the other: ``(a+)+$`` takes it minutes on thirty letters. Here the bits of
a number are the positions of a text that an expression can have reached, and each part of it maps
such numbers to such numbers (Thompson, "Regular Expression Search Algorithm", CACM 11, 1968). Work
is counted, not timed: what is refused is refused on every machine.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import dropwhile, takewhile
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from autoround.errors import InputError

#: Characters of the longest expression.
LONGEST = 10_000
#: Steps of one match, for each character of the text and of the expression.
STEPS = 100

_FLAGS = re.IGNORECASE | re.DOTALL | re.VERBOSE | re.UNICODE


class _Refused(Exception):
    """Why an expression is not taken."""


class _Text:
    """A text, and what is left of the work allowed on it. Bit i: the place before character i."""

    def __init__(self, text: str, steps: int) -> None:
        self.text, self.steps = text, steps
        self.end = 1 << len(text)
        self.places = _places(text)  # of each character

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise _Refused(
                "takes too many steps; leave out repeats inside of repeats, and what looks ahead"
            )


@lru_cache(maxsize=64)
def _places(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for at, char in enumerate(text):
        found[char] = found.get(char, 0) | 1 << at
    return found


#: Places in a text.
Where = Callable[[_Text], int]
#: Places before a part -> places after it.
Part = Callable[[_Text, int], int]
Char = Callable[[str], bool]


class Pattern:
    """One expression, ready. Raises InputError where ``source`` is none, or has what only
    backtracking can match: back references, atomic groups, possessive repeats."""

    def __init__(self, source: str) -> None:
        self.source = source
        if len(source) > LONGEST:
            raise self._refused(f"has {len(source)} characters, more than {LONGEST}")
        try:
            tree = parser.parse(source)
            self._part = _sequence(tree, tree.state.flags)
            self._begin = _literals(tree) if not tree.state.flags & re.IGNORECASE else ""
        except (re.error, OverflowError) as error:
            raise self._refused(f"is not a regular expression: {error}") from None
        except RecursionError:
            raise self._refused("is nested too deeply") from None
        except _Refused as error:
            raise self._refused(str(error)) from None

    def match(self, text: str) -> bool:
        """Whether ``text`` begins with what this describes, as for ``re.match``."""
        return text.startswith(self._begin) and self._run(text, 1)

    def search(self, text: str) -> bool:
        """Whether it is anywhere in ``text``, as for ``re.search``."""
        return self._begin in text and self._run(text, (2 << len(text)) - 1)

    def _run(self, text: str, starts: int) -> bool:
        try:
            return self._part(_Text(text, STEPS * (len(text) + len(self.source))), starts) != 0
        except RecursionError:
            raise self._refused("is nested too deeply") from None
        except _Refused as error:
            raise self._refused(str(error)) from None

    def _refused(self, why: str) -> InputError:
        return InputError(f"the pattern {self.source!r:.80} {why}")


#: Patterns of one file that are kept ready, and the most that one may have.
MOST = 1 << 16
#: A file's patterns are asked about each of its modules: thousands of both, where every expert has
#: a row of its own. Of most only the beginning is looked at (.6 us; the whole of one takes 20).
compiled = lru_cache(maxsize=MOST)(Pattern)


def _literals(tree: Any) -> str:
    """What everything that is described begins with."""
    rest = dropwhile(lambda row: row == (op.AT, op.AT_BEGINNING), tree)
    return "".join(chr(value) for _, value in takewhile(lambda row: row[0] is op.LITERAL, rest))


# ---- parts ---------------------------------------------------------------------------------------


def _sequence(nodes: Any, flags: int) -> Part:
    parts = [_part(code, value, flags) for code, value in nodes]

    def run(text: _Text, at: int) -> int:
        for part in parts:
            if not at:
                break
            at = part(text, at)
        return at

    return run


def _part(code: Any, value: Any, flags: int) -> Part:
    """A row of the parser's tree."""
    if flags & ~_FLAGS:
        raise _Refused("has a flag other than (?i), (?s) and (?x); leave it out")
    if (where := _char(code, value, flags)) is not None:
        return _one(where)
    if code is op.SUBPATTERN:
        _, added, removed, inner = value
        return _sequence(inner, (flags | added) & ~removed)
    if code is op.BRANCH:
        return _either([_sequence(way, flags) for way in value[1]])
    if code in (op.MAX_REPEAT, op.MIN_REPEAT):
        least, most, inner = value
        where = (
            _char(inner[0][0], inner[0][1], flags)
            if len(inner) == 1 and most == op.MAXREPEAT
            else None
        )
        return _repeat(least, most, _sequence(inner, flags), where)
    if code in (op.ASSERT, op.ASSERT_NOT):
        way, inner = value
        least, most = inner.getwidth()
        if way < 0 and least != most:
            raise _Refused("is not a regular expression: look-behind requires a fixed width")
        look = _behind(_sequence(inner, flags), least) if way < 0 else _sequence(inner, flags)
        return _each(look, code is op.ASSERT)
    if code is op.AT:
        return lambda text, at: at & _BORDERS[value](text)
    raise _Refused("has a back reference, an atomic group or a possessive repeat; leave it out")


def _one(where: Where) -> Part:
    def run(text: _Text, at: int) -> int:
        text.step()
        return (at & where(text)) << 1

    return run


def _either(ways: Sequence[Part]) -> Part:
    def run(text: _Text, at: int) -> int:
        after = 0
        for way in ways:
            after |= way(text, at)
        return after

    return run


def _repeat(least: int, most: int, part: Part, where: Where | None) -> Part:
    """``where``: of the one character that is repeated without end, if it is one."""

    def run(text: _Text, at: int) -> int:
        for _ in range(least):  # ends: places only grow, so they settle in as many rounds
            before, at = at, part(text, at)
            text.step()
            if at == before:
                break
        if where is not None:
            text.step()
            held = where(text)
            return at | ((at & held) + held) ^ held  # the carry runs to the end of a run of ones
        new = at
        for _ in range(most - least):
            new = part(text, new) & ~at
            text.step()
            if not new:
                break
            at |= new
        return at

    return run


def _each(look: Part, wanted: bool) -> Part:
    """The places from which ``look``, each by itself, arrives anywhere or nowhere."""

    def run(text: _Text, at: int) -> int:
        kept = 0
        while at:
            text.step()
            place = at & -at
            if (look(text, place) != 0) == wanted:
                kept |= place
            at ^= place
        return kept

    return run


def _behind(part: Part, width: int) -> Part:
    """From ``width`` characters before a place to the place."""
    return lambda text, place: part(text, place >> width)


# ---- characters and borders ----------------------------------------------------------------------


def _char(code: Any, value: Any, flags: int) -> Where | None:
    """The places before characters that a row takes; None = it takes no single character."""
    if code is op.ANY:
        return _passing(lambda char: bool(flags & re.DOTALL) or char != "\n")
    if code is op.LITERAL and not flags & re.IGNORECASE:
        only = chr(value)
        return lambda text: text.places.get(only, 0)
    if code is op.IN:
        rows = value
    elif code in (op.LITERAL, op.NOT_LITERAL):
        rows = [(op.NEGATE, None)] * (code is op.NOT_LITERAL) + [(op.LITERAL, value)]
    else:
        return None
    negated = rows[0][0] is op.NEGATE
    return _passing(_among(rows[negated:], negated, bool(flags & re.IGNORECASE)))


def _passing(test: Char) -> Where:
    known = lru_cache(maxsize=256)(test)
    return lambda text: sum(bits for char, bits in text.places.items() if known(char))


def _among(rows: Sequence[tuple[Any, Any]], negated: bool, fold: bool) -> Char:
    def one(char: str) -> bool:
        number = ord(char)
        return any(
            value == number if code is op.LITERAL
            else value[0] <= number <= value[1] if code is op.RANGE
            else _KINDS[value](char)
            for code, value in rows
        )  # fmt: skip

    def run(char: str) -> bool:
        forms = [char, char.lower(), char.upper()] if fold else [char]
        return any(one(form) for form in forms if len(form) == 1) != negated

    return run


def _word(char: str) -> bool:
    return char.isalnum() or char == "_"


_KINDS: dict[Any, Char] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    op.CATEGORY_WORD: _word,
    op.CATEGORY_NOT_WORD: lambda char: not _word(char),
}


def _last(text: _Text) -> int:
    """The end, and the place before a line feed there."""
    return text.end | (text.end >> 1 if text.text.endswith("\n") else 0)


_words = _passing(_word)


def _edges(text: _Text) -> int:
    """Where a word begins or ends."""
    words = _words(text)
    return words ^ words << 1


_BORDERS: dict[Any, Callable[[_Text], int]] = {
    op.AT_BEGINNING: lambda text: 1,
    op.AT_BEGINNING_STRING: lambda text: 1,
    op.AT_END: _last,
    op.AT_END_STRING: lambda text: text.end,
    op.AT_BOUNDARY: _edges,
    op.AT_NON_BOUNDARY: lambda text: (2 * text.end - 1) & ~_edges(text),
}
