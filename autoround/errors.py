# SPDX-License-Identifier: Apache-2.0
"""The one error that means "your input, and here is what to do about it"."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: A message keeps this many characters at most, from both its ends.
MOST = 800


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line: the value and the remedy.

    What files hold gets into messages, so whatever is not printable is shown escaped.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        half = MOST // 2
        super().__init__(line if len(line) <= MOST else f"{line[:half]} ... {line[-half:]}")


@contextmanager
def about(path: Path) -> Iterator[None]:
    """What is refused inside is refused of ``path``, and says so if it does not yet."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}") from error


@contextmanager
def blamed(what: str, remedy: str) -> Iterator[None]:
    """Code that others wrote, on files that say what it does: whatever it raises, panics of native
    code (which are no Exceptions) included, is the files' fault; want of memory or disk is not."""
    try:
        yield
    except (InputError, OSError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if any(words in str(error) for words in ("allocate memory", "out of memory")):
            raise
        raise InputError(
            f"{what} ({type(error).__name__}: {str(error)[:300]}); {remedy}"
        ) from error
