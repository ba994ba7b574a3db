# SPDX-License-Identifier: Apache-2.0
"""The loop of every reader: one JSON question a line, one JSON answer; nothing of ours is imported.

A question names a directory, token ids and the file for the answer's tensors: ``logits`` (f32, a
row of the ids each) and, where the reader can say, ``dense <module>``: the weight it multiplies by.
"""

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

Answer = tuple[dict[str, Any], dict[str, int]]  # tensors by name; modules by the kind that serves


def serve(load: Callable[[str, str], Answer], save: Callable[[dict[str, Any], str], None]) -> None:
    """Answer until the input ends. Readers print, too: an answer starts with ``ANSWER``."""
    for line in sys.stdin:
        question = json.loads(line)
        try:
            tensors, modules = load(question["directory"], question["ids"])
            save(tensors, question["out"])
            answer: dict[str, Any] = {"modules": modules}
        except Exception as error:  # whatever a reader throws is its answer
            traceback.print_exc()
            text = " ".join(str(error).split()) or "no message"
            answer = {"refused": f"{type(error).__name__}: {text}"}
        print("\nANSWER", json.dumps(answer), flush=True)


def kinds(modules: Iterable[Any], has: tuple[str, ...]) -> dict[str, int]:
    """How many modules of each class hold one of these tensors."""
    return dict(Counter(type(m).__name__ for m in modules if any(hasattr(m, name) for name in has)))
