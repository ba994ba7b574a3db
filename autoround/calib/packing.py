# SPDX-License-Identifier: Apache-2.0
"""Token documents of any length to rows of exactly ``seqlen`` tokens, without padding."""

from __future__ import annotations

from collections import Counter, deque


class Packer:
    """Collects rows; give it documents until ``len(packer.rows)`` is enough.

    A document of at least ``seqlen`` tokens gives one row, its first ``seqlen`` tokens, and what
    is left of it is kept for :meth:`use_spare`. Shorter documents are joined and the stream is cut
    into rows. With ``concat`` every document goes into the stream. No token is lost on the way;
    only rows in which one token fills more than half are dropped, and counted.
    """

    def __init__(self, seqlen: int, concat: bool = False) -> None:
        self.rows: list[list[int]] = []
        self.documents = 0
        self.tokens = 0  # tokens offered, separators included
        self.whole = 0
        self.packed = 0
        self.dropped = 0
        self.seqlen = seqlen
        self._concat = concat
        self._stream: list[int] = []
        self._spare: deque[list[int]] = deque()

    def add(self, ids: list[int], close: int | None = None) -> None:
        """Take one document; ``close`` is the token that marks its end where documents are joined.

        An empty document is ignored.
        """
        if not ids:
            return
        self.documents += 1
        ending = [close] if close is not None and ids[-1] != close else []
        if self._concat or len(ids) < self.seqlen:
            self.tokens += len(ids) + len(ending)
            self._extend(ids + ending)
            return
        self.whole += self._keep(ids[: self.seqlen])
        rest = ids[self.seqlen :]
        if rest:
            self._spare.append(rest + ending)
        self.tokens += len(ids) + (len(ending) if rest else 0)

    def use_spare(self, target: int) -> None:
        """Join the ends of long documents too, until there are ``target`` rows or none is left."""
        while self._spare and len(self.rows) < target:
            self._extend(self._spare.popleft())

    @property
    def leftover(self) -> int:
        """Tokens that are in no row yet."""
        return len(self._stream) + sum(map(len, self._spare))

    def summary(self) -> str:
        """One clause for the log."""
        text = f"{self.documents} documents, {self.whole} rows whole, {self.packed} packed"
        return text + (f", {self.dropped} dropped as one repeated token" if self.dropped else "")

    def _extend(self, ids: list[int]) -> None:
        self._stream.extend(ids)
        full = len(self._stream) // self.seqlen * self.seqlen
        for start in range(0, full, self.seqlen):
            self.packed += self._keep(self._stream[start : start + self.seqlen])
        del self._stream[:full]

    def _keep(self, row: list[int]) -> bool:
        # A row of padding or of one filler token says nothing about the weights.
        if Counter(row).most_common(1)[0][1] * 2 > self.seqlen:
            self.dropped += 1
            return False
        self.rows.append(row)
        return True
