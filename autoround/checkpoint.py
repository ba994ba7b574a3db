# SPDX-License-Identifier: Apache-2.0
"""A safetensors checkpoint directory, read by its headers; tensors are mapped when asked for."""

import hashlib
import json
import math
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoround import digest
from autoround.errors import InputError
from autoround.files import AGAIN, read_json
from autoround.header import Entry, read_header
from autoround.stacks import Slab, Stack, find_stacks, kind_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"^.+-\d{5}-of-(\d{5})\.safetensors$")
SHARD_NAME = re.compile(r"[\w. +=@~-]{1,200}\.safetensors")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
#: Settings that say how often something is there: as many names or rows there must be, too.
COUNTS = re.compile(r"(^|_)n(um)?_(\w+_)?(layers?|experts|blocks|labels)$|^depth$")
#: Settings that are objects, where they are there.
TABLES = ("text_config", "rope_parameters", "rope_scaling")
#: The output projection, and how the embedding that it may be tied to ends.
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
FLOATS = {"F16", "BF16", "F32", "F64"}
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# What a runtime may want beside the weights; no weights, git files or documentation.
COMPANIONS = (
    "tokenizer*", "*.tiktoken", "*.model", "vocab.*", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.*", "additional_chat_templates/**/*",
    "generation_config.json", "*processor_config.json", "feature_extractor*", "**/*.py",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "[0-9]_*/*.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
LONGEST_PATH = 4000  # characters; the system's own limit is 4096 bytes
LARGEST_COMPANION = 1_000_000_000  # bytes
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
WANTED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
)


def resolve(model: str) -> Path:
    """A local directory, or a hub id looked up in the local cache and then on the hub."""
    if len(model) > LONGEST_PATH:
        raise InputError(
            f"{model[:60]!r}... has {len(model)} characters: no path; give a directory"
        )
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

    patterns = list(WANTED)
    try:
        cached = Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        if any(cached.glob("*.safetensors")):
            return cached
    except Exception:  # not cached; the hub client has a class for each way of not being there
        pass
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, etag_timeout=5))
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(
            f"{model} is neither a local directory nor reachable on the hub ({reason}); "
            f"run `hf download {model}` where there is a network, or give a directory"
        ) from error


class Checkpoint:
    """A validated checkpoint directory. Only headers are held; every tensor is mapped afresh, so
    that a mapping lives exactly as long as the tensor handed out. One that is quantized
    is refused unless ``quantized`` says that it may be."""

    def __init__(self, path: str | Path, *, quantized: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(
                f"{path} is not a directory; give the directory that contains config.json"
            )
        if not (self.path / "config.json").is_file():
            raise InputError(
                f"{path} has no config.json: not a checkpoint; give the model directory itself"
            )
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self._refuse_shapeless()
        _refuse_companions(self.path)
        if not quantized:
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
        self._refuse_counts()

    def _refuse_shapeless(self) -> None:
        """Tables of a config that are something else: everyone looks into them."""
        text = self.config.get("text_config")
        for part in (self.config, text if isinstance(text, dict) else {}):
            for key in TABLES:
                if not isinstance(part.get(key), dict | None):
                    raise InputError(
                        f"{self.path / 'config.json'}: {key} is {part[key]!r:.60}, no object; "
                        f"{AGAIN}"
                    )

    def _refuse_counts(self) -> None:
        """A config that counts more layers or experts than there can be: whoever builds a model of
        it would take all memory, and the night."""
        sizes = (max(entry.shape, default=0) for entry in self.entries.values())
        most = max(len(self.entries), *sizes)
        parts = [self.config]
        while parts:
            part = parts.pop()
            parts += [value for value in part.values() if isinstance(value, dict)]
            for key, value in part.items():
                if COUNTS.search(key) and isinstance(value, int | float) and value > most:
                    raise InputError(
                        f"{self.path / 'config.json'} says {key} = {value:.6g}, and there are "
                        f"{len(self.entries)} tensors; {AGAIN}"
                    )

    def _refuse_quantized(self) -> None:
        if found := self.quantization:
            method = found.get("quant_method", "mlx")
            raise InputError(
                f"{self.path} is already quantized ({method}); give the original checkpoint"
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
                f"{self.path} holds only pickled weights ({pickles[0]}), which can run code when "
                "opened; take the safetensors revision, or convert it in a sandbox with "
                "AutoModel.from_pretrained(...).save_pretrained(...)"
            )
        raise InputError(f"{self.path} holds no *.safetensors file; {AGAIN}")

    def _indexed(self) -> dict[Path, list[str]]:
        index = self.path / INDEX
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f"{index} has no weight_map; {AGAIN}")
        shards: dict[Path, list[str]] = {}
        for name, file in names.items():
            if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
                raise InputError(
                    f"{index} places {name} in {file!r:.200}, outside the directory or no "
                    f"name of a safetensors file; {AGAIN}"
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
    def quantization(self) -> dict[str, Any] | None:
        """What config.json says of how it is quantized; None = it is not."""
        text = self.config.get("text_config")
        for part in (self.config, text if isinstance(text, dict) else {}):
            for key in ("quantization_config", "quantization"):
                if found := part.get(key):
                    return found if isinstance(found, dict) else {"quant_method": str(found)}
        return None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """Experts that are stored as one tensor, by its key."""
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        return find_stacks(shapes, kind_of(self.config))

    @cached_property
    def slabs(self) -> dict[str, Slab]:
        """Single experts' layers, by the keys that they would have on their own."""
        return {key: slab for one in self.stacks.values() for key, slab in one.layers.items()}

    @cached_property
    def copies(self) -> dict[str, str]:
        """A head that is stored beside the embedding it is tied to, with the same bytes: its key
        -> the embedding's."""
        head = self.entries.get(HEAD)
        if head is None or self.config.get("tie_word_embeddings") is not True:
            return {}
        for key, e in self.entries.items():
            alike = key.endswith(EMBEDDING) and (e.dtype, e.shape) == (head.dtype, head.shape)
            if alike and torch.equal(self._bits(HEAD), self._bits(key)):
                return {HEAD: key}
        return {}

    def _bits(self, name: str) -> Tensor:
        """A tensor's numbers as integers: 0 is not -0, and bytes compare at half the speed."""
        x = self.get(name)
        return x.view(INTEGERS.get(x.element_size(), torch.uint8))

    def unstacked(self, chosen: Iterable[str]) -> list[str]:
        """Keys of all tensors; in the place of a stack that layers in ``chosen`` are of, those of
        its layers."""
        split = {slab.stack for key in chosen if (slab := self.slabs.get(key))}
        return [
            key
            for name in self.entries
            for key in (self.stacks[name].layers if name in split else (name,))
        ]

    def entry(self, name: str) -> Entry:
        """The entry of a tensor, or InputError with the directory."""
        if name not in self.entries:
            raise InputError(
                f"{self.path} has no tensor {name}; see Checkpoint.entries for the names"
            )
        return self.entries[name]

    def get(self, name: str, rows: slice = slice(None)) -> Tensor:
        """One tensor, one expert's layer of a stack, or some rows of a tensor, mapped without a
        copy; writing to it changes neither file nor later reads. The mapping lives as long as the
        tensor.

        The header was read once: opening a shard anew for each of its thousands of tensors would
        take longer than reading them.
        """
        if name not in self.entries and (slab := self.slabs.get(name)):
            return slab.of(self.get(slab.stack, slice(slab.expert, slab.expert + 1))[0])[rows]
        entry = self.entry(name)
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise InputError(
                f"{name} in {entry.file} is stored in {entry.dtype}, which cannot be read"
            )
        begin, end, _ = rows.indices(entry.shape[0] if entry.shape else 1)
        shape = (max(end - begin, 0), *entry.shape[1:]) if entry.shape else ()
        start = begin * (entry.nbytes // entry.shape[0] if entry.shape and entry.nbytes else 0)
        return _mapped(entry, start, math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors, each a mapping of its own."""
        return {name: self.get(name) for name in names}

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

    def scan_finite(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Read every tensor once: its digest. InputError at the first with NaN or infinity."""
        return {
            name: self._examined(name, self._pieces(name))
            for name in (self.entries if names is None else names)
        }

    def examined(self, name: str, x: Tensor) -> str:
        """`scan_finite` of one tensor that is mapped already."""
        return self._examined(name, digest.pieces(x))

    def _pieces(self, name: str) -> Iterator[Tensor]:
        # A mapping for each: its pages leave this process before the next is read.
        entry = self.entry(name)
        for start in range(0, entry.nbytes, digest.PIECE):
            x = _mapped(entry, start, min(digest.PIECE, entry.nbytes - start))
            yield x.view(DTYPES.get(entry.dtype, torch.uint8))

    def _examined(self, name: str, pieces: Iterable[Tensor]) -> str:
        entry = self.entry(name)
        found, finite = digest.examine(pieces)
        if not finite:
            bad = int((~self.get(name).isfinite()).sum())
            raise InputError(
                f"{name} in {entry.file} holds {bad} NaN or infinite weights; "
                f"{AGAIN}, or repair the checkpoint"
            )
        return found

    def content(self, digests: Mapping[str, str]) -> dict[str, str]:
        """One digest for the tensors of each shard, given those of all tensors, and for every file
        that decides what the model is or travels with it."""
        shards: dict[str, Any] = {}
        for name, entry in self.entries.items():
            row = [name, entry.dtype, entry.shape, digests[name]]
            shards.setdefault(entry.file.name, hashlib.sha256()).update(json.dumps(row).encode())
        files = {str(p): digest.of_file(self.path / p) for p in companions(self.path)}
        return {
            "config.json": digest.of_file(self.path / "config.json"),
            **files,
            **{name: shard.hexdigest()[:32] for name, shard in sorted(shards.items())},
        }


def _mapped(entry: Entry, start: int, size: int) -> Tensor:
    """Bytes of a tensor, mapped without a copy and private to the reader."""
    if size <= 0:
        return torch.empty(0, dtype=torch.uint8)
    at = entry.start + start
    page = at % mmap.ALLOCATIONGRANULARITY
    try:
        with entry.file.open("rb") as file:
            held = mmap.mmap(file.fileno(), page + size, access=mmap.ACCESS_COPY, offset=at - page)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{entry.file} changed or broke since it was opened ({error}); {AGAIN}"
        ) from error
    return torch.frombuffer(held, dtype=torch.uint8, offset=page)


def _refuse_companions(path: Path) -> None:
    """Files that are copied to every result, as they are: what a link in a checkpoint leads to
    outside of it might be anything of this machine's. Links of the hub's own cache, and links to a
    file of the same name (a directory made of links to another), are what they seem."""
    home = path.resolve()
    cache = home.parents[1] if home.parent.name == "snapshots" else home
    for relative in companions(path):
        file = path / relative
        real = file.resolve()
        inside = real.is_relative_to(home) or real.is_relative_to(cache)
        if not inside and real.name != file.name:
            raise InputError(
                f"{file} is a link to {real}, outside the checkpoint; put the file itself there"
            )
        if real.stat().st_size > LARGEST_COMPANION:
            raise InputError(f"{file} has {real.stat().st_size / 1e9:.3g} GB; {AGAIN}")


def companions(path: Path) -> list[Path]:
    """Files that must travel with the model in a directory, relative to it, sorted."""
    files = {file for pattern in COMPANIONS for file in path.glob(pattern)}
    kept = [
        file.relative_to(path) for file in files if file.is_file() and file.suffix not in WEIGHTS
    ]
    return sorted(f for f in kept if not any(p[0] == "." or p[:2] == "__" for p in f.parts[:-1]))
