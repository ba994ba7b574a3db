# SPDX-License-Identifier: Apache-2.0
"""Datasets of the Hugging Face hub: familiar names, and loading that fails fast and says why.

``datasets`` is optional and imported here only. A dataset the user named is never replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from autoround.errors import InputError

_PROBE_SECONDS = 5.0
_SHUFFLE_BUFFER = 10_000
_INSTEAD = "or pass a local .jsonl/.txt/.parquet file, or use the bundled text (--dataset bundled)"


@dataclass(frozen=True, slots=True)
class HubDataset:
    """Where a dataset lives and which part of it holds text.

    ``columns`` are joined by an empty line into one text; empty means the rows speak for
    themselves. ``streaming`` avoids downloading the very large ones.
    """

    repo: str
    split: tuple[str, ...] = ("train",)
    config: str | None = None
    columns: tuple[str, ...] = ()
    streaming: bool = False


_KNOWN = (
    HubDataset("NeelNanda/pile-10k", columns=("text",)),
    HubDataset("swift/pile-val-backup", ("validation",), columns=("text",)),
    HubDataset("mit-han-lab/pile-val-backup", ("validation",), columns=("text",)),
    HubDataset(
        "HuggingFaceFW/fineweb-edu", config="sample-10BT", columns=("text",), streaming=True
    ),
    HubDataset("openbmb/Ultra-FineWeb", ("en",), columns=("content",), streaming=True),
    HubDataset("BAAI/CCI3-HQ", columns=("text",), streaming=True),
    HubDataset("codeparrot/github-code-clean", columns=("code",), streaming=True),
    HubDataset("nvidia/OpenCodeInstruct", columns=("input", "output"), streaming=True),
    HubDataset("HuggingFaceH4/ultrachat_200k", ("train_sft",)),
    HubDataset("madao33/new-title-chinese", columns=("content",)),
    HubDataset(
        "google-research-datasets/mbpp", ("train", "validation", "test"), columns=("text", "code")
    ),
)
_ALIASES = {"opencode-instruct": "nvidia/OpenCodeInstruct", "mbpp": _KNOWN[-1].repo}
_BY_NAME = {
    name.lower(): known for known in _KNOWN for name in (known.repo, known.repo.split("/")[1])
} | {alias: next(k for k in _KNOWN if k.repo == repo) for alias, repo in _ALIASES.items()}


def resolve(name: str, split: tuple[str, ...]) -> HubDataset:
    """The hub dataset a name means; raises InputError when it cannot be one."""
    known = _BY_NAME.get(name.lower())
    if known is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(
            f"dataset {name!r} is neither a file nor a dataset known by that name: give a path, "
            "a hub id like owner/name, or 'bundled'"
        )
    found = known or HubDataset(name)
    return HubDataset(
        found.repo, split or found.split, found.config, found.columns, found.streaming
    )


def rows(name: str, split: tuple[str, ...], seed: int) -> Iterator[Any]:
    """Shuffled rows of a hub dataset, split after split; InputError when it cannot be had."""
    hub = resolve(name, split)
    if importlib.util.find_spec("datasets") is None:
        raise InputError(
            f"dataset {name!r} is on the hub, which needs the 'datasets' package: "
            f"pip install datasets, {_INSTEAD}"
        )
    _probe(name)
    datasets: Any = importlib.import_module("datasets")  # two seconds, and optional

    parts: list[Any] = []
    for part in hub.split:
        try:
            loaded = datasets.load_dataset(
                hub.repo, hub.config, split=part, streaming=hub.streaming
            )
        except Exception as error:  # the library raises a dozen kinds, all meaning "not there"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"dataset {name!r} (split {part!r}) cannot be loaded: {reason}; "
                f"check the name and the connection, {_INSTEAD}"
            ) from error
        parts.append(_shuffled(loaded, hub.streaming, seed))
    return _joined(parts, hub.columns)


def _shuffled(loaded: Any, streaming: bool, seed: int) -> Any:
    if streaming:
        return loaded.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    return loaded.shuffle(seed=seed)


def _joined(parts: list[Any], columns: tuple[str, ...]) -> Iterator[Any]:
    for part in parts:
        for row in part:
            yield "\n\n".join(str(row[c]) for c in columns if row.get(c)) if columns else row


def _probe(name: str) -> None:
    """Ask the hub for a sign of life, because ``datasets`` would retry for half a minute.

    With HF_HUB_OFFLINE set nothing is asked: ``datasets`` then answers from its cache or at once.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
            return
    except urllib.error.HTTPError:
        return  # any answer is an answer
    except (OSError, ValueError) as error:
        raise InputError(
            f"dataset {name!r} is on the hub and {endpoint} cannot be reached ({error}): set "
            f"HF_HUB_OFFLINE=1 if it is in your cache, {_INSTEAD}"
        ) from error
