# SPDX-License-Identifier: Apache-2.0
"""One fate for every tensor of the source, taken down as it is written, and balanced at the end."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from autoround.errors import InputError

T = TypeVar("T")
#: A tensor of the output and the piece of it (0 where it is written whole).
Place = tuple[str, int]


@dataclass(slots=True)
class Ledger:
    """``fates``: tensor of the source -> what became of it, in the order of writing.

    ``places``: for every directory, tensor of the source -> where it is in the files there.
    """

    fates: dict[str, str] = field(default_factory=dict)
    places: tuple[dict[str, list[Place]], ...] = ()

    def enter(self, key: str, fate: str, places: Sequence[list[Place]]) -> None:
        """A tensor that has been written to every directory."""
        if key in self.fates:
            raise AssertionError(f"{key} has two fates: {self.fates[key]}; {fate}")
        self.fates[key] = fate
        for own, written in zip(self.places, places, strict=True):
            own[key] = written

    def withdraw(self, keys: Collection[str]) -> None:
        """Tensors that will be written again."""
        for written in (self.fates, *self.places):
            for key in keys:
                written.pop(key, None)  # type: ignore[attr-defined]

    def balance(
        self,
        source: Collection[str],
        planned: Mapping[str, str],
        outputs: Sequence[Mapping[str, int]],
    ) -> None:
        """Raises InputError unless all of this holds, with ``source`` and ``outputs`` (name ->
        pieces) read from the headers of the files as they are now:

        every tensor of the source has one fate, the ``planned`` one, and nothing else has any;
        every tensor of every output was written by one of them, each piece once.
        """
        wrong = [*self._fates(source, planned)]
        for own, output in zip(self.places, outputs, strict=True):
            wrong += _places(own, output)
        if wrong:
            raise InputError(
                f"the ledger does not balance: {wrong[0]} ({len(wrong)} such); nothing is taken "
                "for finished. This is a mistake of ours, or of the disk: report it"
            )

    def _fates(self, source: Collection[str], planned: Mapping[str, str]) -> Iterator[str]:
        for key in _only(source, self.fates):
            yield f"nothing became of {key} of the source"
        for key in _only(self.fates, source):
            yield f"{key} is {self.fates[key]} and not in the source"
        for key, fate in self.fates.items():
            if planned.get(key) != fate:
                yield f"{key} is {fate}, planned was {planned.get(key)}"


def _places(own: Mapping[str, list[Place]], output: Mapping[str, int]) -> Iterator[str]:
    written = Counter(place for places in own.values() for place in places)
    there = {(name, piece) for name, pieces in output.items() for piece in range(pieces)}
    for name, piece in _only(written, there):
        yield f"{name} (piece {piece}) was written and is not in the files"
    for name, piece in _only(there, written):
        yield f"{name} (piece {piece}) is in the files and nothing became it"
    for (name, piece), count in written.items():
        if count > 1:
            yield f"{name} (piece {piece}) was written {count} times"


def _only(these: Collection[T], others: Collection[T]) -> list[T]:
    return [one for one in these if one not in others]
