# SPDX-License-Identifier: Apache-2.0
"""A safetensors checkpoint directory, read by its headers; tensors stay in the page cache until asked for."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoround.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"^.+-\d{5}-of-(\d{5})\.safetensors$")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
MAX_HEADER = 100_000_000  # the limit of the format's own reader
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATS = {"F16", "BF16", "F32", "F64"}
# Everything a runtime may want beside the weights. Weights, git files and documentation are not in it.
COMPANIONS = (
    "tokenizer*", "*.tiktoken", "*.model", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.*", "additional_chat_templates/**/*", "generation_config.json", "*processor_config.json",
    "feature_extractor*", "**/*.py", "modules.json", "sentence_bert_config.json", "data_config.json",
    "config_sentence_transformers.json", "[0-9]_*/*.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ckpt",
}
PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: shard, safetensors dtype ("BF16"), shape, bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def resolve(model: str) -> Path:
    """A local directory, or a hub id looked up in the local cache and then on the hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise InputError(f"{model} is a file; give the model directory that contains config.json")
    if not HUB_ID.match(model):
        raise InputError(
            f"{model} does not exist; give a model directory or a hub id such as org/name"
        )
    return _snapshot(model)


def _snapshot(model: str) -> Path:
    # Imported here: a local directory needs no hub client.
    from huggingface_hub import snapshot_download

    patterns = [
        "*.safetensors",
        "*.json",
        "*.jinja",
        "*.txt",
        "*.model",
        "*.tiktoken",
        "*.py",
        "LICENSE*",
        "NOTICE*",
    ]
    try:
        cached = Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        if any(cached.glob("*.safetensors")):
            return cached
    except (
        Exception
    ):  # not in the cache; the hub client has a class for each way of not being there
        pass
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, etag_timeout=5))
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(
            f"{model} is neither a local directory nor reachable on the hub ({reason}); "
            f"run `hf download {model}` where there is a network, or give a directory"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); {AGAIN}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {type(data).__name__}, not a JSON object; {AGAIN}")
    return data


def _entry(path: Path, name: str, raw: Any) -> tuple[int, int, Entry]:
    """One header row -> (begin, end, entry), its size checked against its shape."""
    try:
        dtype, shape, (begin, end) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
        count = math.prod(shape)
        good = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and dtype in BITS
    except (KeyError, TypeError, ValueError):
        good = False
    if not good or (end - begin) * 8 != count * BITS[dtype]:
        raise InputError(f"{path}: the header row of {name} is wrong ({str(raw)[:80]}); {AGAIN}")
    return begin, end, Entry(path, dtype, shape, end - begin)


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of one safetensors file in file order; the file's size must agree to the byte."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = file.read(length) if 2 <= length <= min(MAX_HEADER, size - 8) else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error
    if not head:
        raise InputError(
            f"{path} has {size} bytes and no valid safetensors header: truncated or corrupt; {AGAIN}"
        )
    try:
        table = json.loads(head)
        rows = sorted(
            (*_entry(path, name, raw)[:2], name, _entry(path, name, raw)[2])
            for name, raw in table.items()
            if name != "__metadata__"
        )
    except (ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: the header is not JSON ({error}): corrupt; {AGAIN}") from error
    at = 0
    for begin, end, name, _ in rows:
        if begin != at:
            raise InputError(
                f"{path}: {name} begins at byte {begin}, expected {at}: overlap or hole; {AGAIN}"
            )
        at = end
    if at != size - 8 - length:
        raise InputError(
            f"{path} has {size} bytes, its header promises {8 + length + at}: truncated; {AGAIN}"
        )
    return {name: entry for *_, name, entry in rows}


class Checkpoint:
    """A validated checkpoint directory. Only headers are held; every tensor read opens its shard afresh,
    so that a mapping lives exactly as long as the tensors handed out."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(
                f"{path} is not a directory; give the directory that contains config.json"
            )
        if not (self.path / "config.json").is_file():
            raise InputError(
                f"{path} has no config.json: not a checkpoint; give the model directory itself"
            )
        self.config: dict[str, Any] = _json(self.path / "config.json")
        self._refuse_quantized()
        self.entries: dict[str, Entry] = {}
        for shard, promised in self._shards().items():
            found = read_header(shard)
            if absent := sorted(set(promised) - set(found)):
                raise InputError(
                    f"{INDEX} names {absent[0]} in {shard}, which does not hold it; {AGAIN}"
                )
            if twice := next((name for name in found if name in self.entries), None):
                raise InputError(
                    f"{twice} is in both {self.entries[twice].file.name} and {shard}; {AGAIN}"
                )
            self.entries.update(found)
        if not self.entries:
            raise InputError(f"{path} holds no tensors; {AGAIN}")

    def _refuse_quantized(self) -> None:
        text = self.config.get("text_config")
        for part in (self.config, text if isinstance(text, dict) else {}):
            if found := part.get("quantization_config"):
                method = (
                    found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
                )
                raise InputError(
                    f"{self.path} is already quantized ({method}); give the original float checkpoint"
                )

    def _shards(self) -> dict[Path, list[str]]:
        """Shard -> names the index promises there (none without an index)."""
        if (self.path / INDEX).is_file():
            return self._indexed()
        if (self.path / SINGLE).is_file():
            return {self.path / SINGLE: []}
        files = sorted(self.path.glob("*.safetensors"))
        numbered = [file for file in files if SHARD.match(file.name)]
        if numbered:
            return {file: [] for file in self._complete(numbered)}
        if len(files) == 1:
            return {files[0]: []}
        if files:
            raise InputError(
                f"{self.path} has {len(files)} safetensors files and no {INDEX}; {AGAIN}"
            )
        pickles = sorted(file.name for pattern in PICKLES for file in self.path.glob(pattern))
        if pickles:
            raise InputError(
                f"{self.path} holds only pickled weights ({pickles[0]}), which can run code when opened; convert with "
                "AutoModel.from_pretrained(...).save_pretrained(...) in a sandbox, or take the safetensors revision"
            )
        raise InputError(f"{self.path} holds no *.safetensors file; {AGAIN}")

    def _indexed(self) -> dict[Path, list[str]]:
        index = self.path / INDEX
        names = _json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f"{index} has no weight_map; {AGAIN}")
        shards: dict[Path, list[str]] = {}
        for name, file in names.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise InputError(
                    f"{index} places {name} in {file!r}, outside the directory; {AGAIN}"
                )
            shards.setdefault(self.path / file, []).append(name)
        for shard in shards:
            if not shard.is_file():
                raise InputError(f"{shard} is missing, {INDEX} names it; {AGAIN}")
        return dict(sorted(shards.items()))

    def _complete(self, shards: list[Path]) -> list[Path]:
        match = SHARD.match(shards[0].name)
        total = int(match.group(1)) if match else 0
        if len(shards) != total:
            raise InputError(
                f"{self.path} has {len(shards)} of {total} shards and no {INDEX}; {AGAIN}"
            )
        return shards

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def entry(self, name: str) -> Entry:
        """The entry of a tensor, or InputError with the directory."""
        if name not in self.entries:
            raise InputError(
                f"{self.path} has no tensor {name}; see Checkpoint.entries for the names"
            )
        return self.entries[name]

    def get(self, name: str) -> Tensor:
        """One tensor, mapped from the file without a copy; writing to it changes neither file nor later reads."""
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors, opening each shard once; a private mapping per call, freed with its tensors."""
        with self.open(names) as slices:
            return {name: piece[...] for name, piece in slices.items()}

    def slice(self, name: str) -> Any:
        """A safetensors slice: indexing it reads only the rows asked for; keeps its shard mapped while alive."""
        with self.open([name]) as slices:
            return slices[name]

    @contextmanager
    def open(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        """Slices of several tensors, opening each shard once."""
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            slices: dict[str, Any] = {}
            for name in names:
                file = self.entry(name).file
                if file not in files:
                    try:
                        files[file] = stack.enter_context(safe_open(file, "pt"))
                    except (SafetensorError, OSError) as error:
                        raise InputError(
                            f"{file} changed or broke since it was opened ({error}); {AGAIN}"
                        ) from error
                slices[name] = files[file].get_slice(name)
            yield slices

    def scan_finite(self, names: Iterable[str] | None = None) -> None:
        """Read every float tensor once, a piece at a time; InputError at the first with NaN or infinity."""
        for name in self.entries if names is None else names:
            if self.entry(name).dtype not in FLOATS:
                continue
            # Opened per tensor so that its pages leave this process's memory before the next one.
            flat = self.get(name).reshape(-1)
            bad = sum(int((~torch.isfinite(part)).sum()) for part in flat.split(1 << 20))
            if bad:
                raise InputError(
                    f"{name} in {self.entries[name].file.name} holds {bad} NaN or infinite weights; "
                    f"{AGAIN}, or repair the checkpoint"
                )

    def companions(self) -> list[Path]:
        """Files that must travel with the model, relative to `path`, sorted; no weights, index, config or README."""
        found = {
            file for pattern in COMPANIONS for file in self.path.glob(pattern) if file.is_file()
        }
        kept = {file.relative_to(self.path) for file in found if file.suffix not in WEIGHT_SUFFIXES}
        return sorted(
            file
            for file in kept
            if not any(part.startswith((".", "__")) for part in file.parts[:-1])
        )
