# SPDX-License-Identifier: Apache-2.0
"""Broken and hostile files, made from small real ones by seed, and what our commands do with them.

    python tests/autoround/hostile.py --cases 3000          # a table of outcomes, and what is wrong
    python tests/autoround/hostile.py --only 'verify gptq/config.json/swap/17'

A case is ``subject/file/mutation/seed``. Each runs in a forked child with a limit on memory and a
clock, so that a crash of native code, a bomb or a hang is an outcome like any other.
"""

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import random
import resource
import shutil
import signal
import string
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

SECONDS = 60.0
#: What one case may add to the address space, and to memory that is really used.
MEMORY, RESIDENT = 3 << 30, 1 << 30
FORMATS = "auto_round,auto_awq,auto_gptq:v2,llm_compressor,mlx,fake"


# ---- what is run ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subject:
    """A command on a copy of one directory of the corpus, and the files in it that are damaged.

    ``{at}`` is the copy, ``{file}`` the damaged file, ``{out}`` a new directory, ``{corpus}`` the
    undamaged corpus. ``words``: what a refusal may say instead of a file's name.
    """

    name: str
    source: str
    files: str
    command: str
    weight: int = 1
    words: tuple[str, ...] = ()


RTN = "--iters 0 --group-size 32 -q"
TUNE = "--nsamples 2 --seqlen 16 --batch-size 2 --group-size 32 -q"
READ = f"{TUNE} --recipe rtn-searched"
EVAL = "--nsamples 2 --seqlen 16"
ROUND = f"quantize {{at}} -o {{out}} {RTN}"
DATA = "{corpus}/run/auto_round --against {corpus}/qwen3 --dataset {file}"
RUNS = {"gptq": "run/auto_gptq-v2", "awq": "run/auto_awq", "ct": "run/llm_compressor",
        "mlx": "run/mlx", "ar": "run/auto_round", "canonical": "lossy/canonical",
        "fake": "run/fake"}  # fmt: skip

SUBJECTS: dict[str, Subject] = {
    row.name: row
    for row in (
        Subject("quantize shards", "llama", "*.safetensors", ROUND, 3),
        Subject("quantize file", "qwen3", "*.safetensors", ROUND, 3),
        Subject("quantize index", "llama", "*.index.json", ROUND, 2),
        Subject("quantize config", "llama", "config.json", ROUND, 2),
        Subject("quantize unknown", "unknown", "config.json", ROUND),
        Subject("plan", "llama", "*.json", "plan {at} -o {out}"),
        Subject("tune config", "qwen3", "config.json",
                f"quantize {{at}} -o {{out}} --dataset {{corpus}}/data/ids.jsonl {TUNE}", 3,
                words=("puts out NaN or infinity",)),
        Subject("tune experts", "moe", "config.json",
                f"quantize {{at}} -o {{out}} --dataset {{corpus}}/data/ids.jsonl {TUNE}",
                words=("puts out NaN or infinity",)),
        Subject("tune weights", "qwen3", "*.safetensors",
                f"quantize {{at}} -o {{out}} --dataset {{corpus}}/data/ids.jsonl {TUNE}"),
        Subject("tune tokenizer", "qwen3", "tokenizer*.json",
                f"quantize {{at}} -o {{out}} --dataset {{corpus}}/data/text.txt {READ}", 2),
        Subject("dataset", "data", "*s.json*",
                f"quantize {{corpus}}/qwen3 -o {{out}} --dataset {{file}} {READ}", 3),
        Subject("dataset text", "data", "text.txt",
                f"quantize {{corpus}}/qwen3 -o {{out}} --dataset {{file}} {READ}"),
        Subject("dataset parquet", "data", "*.parquet",
                f"quantize {{corpus}}/qwen3 -o {{out}} --dataset {{file}} {READ}", 2),
        Subject("layer config", "recipe", "layers.json",
                f"quantize {{corpus}}/llama -o {{out}} --layer-config {{file}} {RTN}",
                words=("layer_config", "pattern", "one tensor and need one scheme")),
        *(Subject(f"{verb} {name}", place, files, command, 2)
          for name, place in RUNS.items()
          for verb, files, command in (
              ("verify", "*.*", "verify {at} --against {corpus}/run"),
              ("convert", "*.*", "convert {at} -o {out} --format llm_compressor"),
              ("load", "*.*", "generate {at} hello --max-new-tokens 2"))),
        Subject("verify alone", "run/auto_gptq-v2", "*.*", "verify {at}"),
        Subject("verify run", "run", "auto_awq/*.*", "verify {at}/mlx", 2),
        Subject("verify lossy", "lossy", "canonical/*.*", "verify {at}/mlx"),
        Subject("export", "run", "auto_awq/*.*", "export {at} -o {out} --format auto_gptq:v2", 2),
        Subject("eval model", "run/auto_round", "*.*",
                f"eval {{at}} --against {{corpus}}/qwen3 {EVAL}"),
        Subject("eval float", "qwen3", "*.*",
                f"eval {{corpus}}/run/auto_round --against {{at}} {EVAL}"),
        Subject("eval dataset", "data", "*s.json*", f"eval {DATA} {EVAL}"),
        Subject("report", "run", "auto_[ar]*/*.*",
                f"report {{at}} --against {{corpus}}/qwen3 {EVAL}", 2),
        Subject("report float", "qwen3", "*.*",
                f"report {{corpus}}/run/mlx -o {{out}} --against {{at}} {EVAL}"),
        Subject("resume", "begun", "journal/*",
                f"quantize {{corpus}}/qwen3 -o {{at}} --dataset {{corpus}}/data/ids.jsonl {TUNE}",
                2, words=("--fresh",)),
        Subject("generate float", "qwen3", "*.json", "generate {at} hello --max-new-tokens 2"),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """``kind``: accepted, refused, found (a difference, by verify), or what is wrong: traceback,
    mute (no line, or several), nameless (the line names no file), crash, hang, bomb."""

    case: str
    kind: str
    line: str
    seconds: float
    mebibytes: int


GOOD = ("accepted", "refused", "found")


# ---- the corpus -------------------------------------------------------------------------------


def make_corpus(root: Path) -> Path:
    """Small real files: three checkpoints, a run in every kind of format, datasets."""
    import torch
    import zoo

    from autoround import cli

    torch.manual_seed(0)
    wide = {"vocab_size": 320, "num_hidden_layers": 2}
    zoo.save("llama", root / "llama", "60KB", wide)
    zoo.save("qwen3", root / "qwen3", "5GB", wide, torch.bfloat16)
    zoo.save("qwen3_moe", root / "moe", "5GB", wide)
    for name in ("llama", "qwen3", "moe"):
        add_tokenizer(root / name)
    shutil.copytree(root / "qwen3", root / "unknown")
    config = json.loads((root / "unknown/config.json").read_text())
    config |= {"model_type": "nonesuch", "architectures": ["NoneSuchForCausalLM"]}
    (root / "unknown/config.json").write_text(json.dumps(config))
    _data(root / "data")
    (root / "recipe").mkdir()
    layers = {"k_proj": {"bits": 8, "group_size": 32}, "layers.1": "W8A16", "o_proj": {"bits": 16}}
    (root / "recipe/layers.json").write_text(json.dumps(layers))
    for name, formats in (("run", FORMATS), ("lossy", "mlx,fake")):
        arguments = f"quantize {root}/qwen3 -o {root}/{name} --format {formats} {RTN} --asym"
        with contextlib.suppress(SystemExit):
            cli.run(arguments.split())
        made = (root / name / "fake/config.json").is_file()
        assert made, "the corpus itself cannot be made"
    _begin(root)
    return root


def _begin(root: Path) -> None:
    """A run that was stopped after its first block."""
    from autoround import cli
    from autoround.run.journal import Journal

    command = f"quantize {root}/qwen3 -o {root}/begun --dataset {root}/data/ids.jsonl {TUNE}"
    commit = Journal.commit

    def stop(journal: Journal, row: dict[str, Any]) -> None:
        commit(journal, row)
        raise KeyboardInterrupt

    Journal.commit = stop  # type: ignore[method-assign]
    with contextlib.suppress(SystemExit):
        cli.run(command.split())
    Journal.commit = commit  # type: ignore[method-assign]
    assert (root / "begun/journal/run.json").is_file(), "the corpus itself cannot be made"


def add_tokenizer(path: Path) -> None:
    """Bytes and a few merges, as the vocabularies of the models above hold them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(["the cat and the dog sat on the mat"] * 9, trainer)
    made.save(str(path / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>",
            "model_max_length": 64,
            "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(said, indent=1))


def _data(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path.mkdir()
    rng = random.Random(5)
    ids = [[rng.randrange(3, 300) for _ in range(24)] for _ in range(12)]
    texts = [" ".join(rng.choices(["the", "cat", "sat", "on", "a", "mat", "and", "ran"], k=30))
             for _ in range(12)]  # fmt: skip
    chats = [[{"role": "user", "content": t}, {"role": "assistant", "content": t}] for t in texts]
    (path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in ids))
    (path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (path / "chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    (path / "texts.json").write_text(json.dumps({"data": [{"text": t} for t in texts]}))
    (path / "text.txt").write_text("\n".join(texts))
    table = pyarrow.table({"text": texts, "other": list(range(12))})
    pyarrow.parquet.write_table(table, path / "rows.parquet")


# ---- mutations --------------------------------------------------------------------------------

WEIRD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, -(2**63), 1e308, 0.5, float("nan"),
    float("inf"), "", "x", "1", "\ud800", "\0", "a\nb\x1b[31m", "x" * 70_000,
    "../../../etc/passwd", "/etc/passwd", [], {}, [[]], [None], {"": {}}, ["a", 1], "float99",
    "int32", "torch.float64", "__import__('os')",
)  # fmt: skip

Rng = random.Random
Mutation = Callable[[Path, Rng], None]


def _nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node below the top."""
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree[:40])
    for key, value in items:
        yield (*path, key)
        yield from _nodes(value, (*path, key))


def _parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _change(tree: Any, rng: Rng) -> None:
    """One structural change of a JSON tree, in place."""
    paths = list(_nodes(tree))
    if not paths:
        return
    # Each depth is as likely as any other: a vocabulary has thousands of leaves.
    depth = rng.choice(sorted({len(p) for p in paths}))
    path = rng.choice([p for p in paths if len(p) == depth])
    parent, key = _parent(tree, path), path[-1]
    old = parent[key]
    what = rng.randrange(8)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "x", "../x", "\ud800", str(key).upper(), "a\nb"])] = parent.pop(key)
    elif what == 2 and isinstance(old, int):
        parent[key] = rng.choice([old + 1, old - 1, -old, old * 2, old << 40, str(old), float(old)])
    elif what == 3:
        parent[key] = [old]
    elif what == 4:
        other = rng.choice(paths)
        parent[key] = json.loads(json.dumps(_parent(tree, other)[other[-1]]))
    else:
        parent[key] = rng.choice(WEIRD)


def _rewritten(change: Callable[[Any, Rng], Any]) -> Mutation:
    """A change of a JSON (or JSON lines) file by its tree."""

    def mutate(file: Path, rng: Rng) -> None:
        text = file.read_text()
        if file.suffix == ".jsonl":
            lines = text.splitlines()
            at = rng.randrange(len(lines))
            tree = json.loads(lines[at])
            lines[at] = json.dumps(change(tree, rng))
            file.write_text("\n".join(lines))
        else:
            file.write_text(json.dumps(change(json.loads(text), rng)))

    return mutate


def _few(tree: Any, rng: Rng) -> Any:
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        _change(tree, rng)
    return tree


def _other_tree(tree: Any, rng: Rng) -> Any:
    return rng.choice([[tree], {"": tree}, *WEIRD])


def _nested(file: Path, rng: Rng) -> None:
    depth = rng.choice([900, 5_000, 300_000])
    shape = rng.choice([("[", "]"), ('{"a":', "}")])
    text = shape[0] * depth + "1" + shape[1] * depth
    place = rng.randrange(3)
    if place == 0:
        file.write_text(text)
    else:
        file.write_text(file.read_text().replace(":", ":" + text + ',"a":' * (place - 1), 1))


def _twice(file: Path, rng: Rng) -> None:
    """A key that is there twice, with another value."""
    text = file.read_text()
    keys = sorted({p[-1] for p in _nodes(json.loads(text.splitlines()[0] if file.suffix == ".jsonl"
                   else text)) if isinstance(p[-1], str)})  # fmt: skip
    if keys:
        value = json.dumps(rng.choice(WEIRD))
        extra = f"{{{json.dumps(rng.choice(keys))}: {value}, "
        file.write_text(text.replace("{", extra, 1))


def _truncated(file: Path, rng: Rng) -> None:
    data = file.read_bytes()
    file.write_bytes(
        data[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data) + 1), len(data) - 1])]
    )


def _longer(file: Path, rng: Rng) -> None:
    file.write_bytes(file.read_bytes() + rng.choice([b"\0", b"}", b"\xff" * 9, b" " * 1000, b"{}"]))


def _flipped(file: Path, rng: Rng) -> None:
    data = bytearray(file.read_bytes())
    if not data:
        return
    reach = rng.choice([16, 200, len(data)])
    for _ in range(rng.choice([1, 1, 3, 50])):
        data[rng.randrange(min(reach, len(data)))] = rng.randrange(256)
    file.write_bytes(bytes(data))


def _cut_out(file: Path, rng: Rng) -> None:
    data = file.read_bytes()
    begin = rng.randrange(len(data) + 1)
    end = min(len(data), begin + rng.choice([1, 8, 100, 10_000]))
    file.write_bytes(data[:begin] + data[end:])


def _inserted(file: Path, rng: Rng) -> None:
    data, at = file.read_bytes(), rng.randrange(file.stat().st_size + 1)
    noise = rng.choice([b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\r\n", rng.randbytes(64), b"," * 9])
    file.write_bytes(data[:at] + noise + data[at:])


def _encoded(file: Path, rng: Rng) -> None:
    text = file.read_bytes().decode("utf-8", "replace")
    name = rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7", "latin-1", "cp037"])
    file.write_bytes(text.encode(name, "replace"))


def _noise(file: Path, rng: Rng) -> None:
    size = rng.choice([0, 8, 1000, 100_000])
    file.write_bytes(rng.choice([rng.randbytes(size), bytes(size), b"\n" * size, b'"' * size]))


def _swapped(file: Path, rng: Rng) -> None:
    """Another file of the same directory under this name."""
    others = sorted(p for p in file.parent.iterdir() if p.is_file() and p != file)
    if others:
        file.write_bytes(rng.choice(others).read_bytes())


def _missing(file: Path, rng: Rng) -> None:
    file.unlink()


def _odd(file: Path, rng: Rng) -> None:
    """Something that is no file of ordinary size: directory, pipe, link, device, terabyte."""
    kind = rng.randrange(8)
    size = file.stat().st_size
    if kind == 7:
        os.truncate(file, size + (1 << 40))
        return
    file.unlink()
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        os.mkfifo(file)
    elif kind == 2:
        file.symlink_to(file)
    else:
        file.symlink_to(
            ["/dev/zero", "/etc/passwd", "/proc/self/mem", "../../../../nowhere", "/dev/full"][
                kind - 2
            ]
        )


def _header(change: Callable[[dict[str, Any], Rng], Any]) -> Mutation:
    """A change of the header of a safetensors file by its tree; the body stays."""

    def mutate(file: Path, rng: Rng) -> None:
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        made = change(json.loads(data[8:end]), rng)
        head = made if isinstance(made, bytes) else json.dumps(made).encode()
        file.write_bytes(len(head).to_bytes(8, "little") + head + data[end:])

    return mutate


def _rows(table: dict[str, Any], rng: Rng) -> tuple[str, dict[str, Any]]:
    name = rng.choice([key for key in table if key != "__metadata__"])
    return name, table[name]


def _offset(table: dict[str, Any], rng: Rng) -> Any:
    _, row = _rows(table, rng)
    at = rng.randrange(2)
    now = row["data_offsets"][at]
    row["data_offsets"][at] = rng.choice(
        [now + 1, now - 1, now + 4096, -now, -1, 0, now << 32, 2**63, 2**64 - 1, str(now),
         float(now), None, [now], True, 1e400]
    )  # fmt: skip
    if rng.random() < 0.2:
        row["data_offsets"] = rng.choice([row["data_offsets"][::-1], [], [0], [0, 0, 0], {}, None])
    return table


def _shape(table: dict[str, Any], rng: Rng) -> Any:
    _, row = _rows(table, rng)
    now = row["shape"]
    row["shape"] = rng.choice(
        [[], [0], now[::-1], [*now, 1], [1, *now], [*now, 0], [-n for n in now], [2**62, 4],
         [2**32, 2**32], now * 400, [float(n) for n in now], [str(n) for n in now], None, "x",
         {str(n): n for n in now}, [True] * len(now), [[n] for n in now], [1] * 3000]
    )  # fmt: skip
    return table


def _dtype(table: dict[str, Any], rng: Rng) -> Any:
    _, row = _rows(table, rng)
    row["dtype"] = rng.choice(
        ["F16", "BF16", "I16", "F32", "I32", "U32", "F64", "I64", "C64", "BOOL", "U8", "I8", "F4",
         "F8_E8M0", "F8_E4M3", "f32", "", None, 4, ["F32"], {"F32": 1}]
    )  # fmt: skip
    return table


def _lying(table: dict[str, Any], rng: Rng) -> Any:
    """A row that fits its bytes and is still another tensor."""
    _, row = _rows(table, rng)
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U8": 1, "I64": 8, "F64": 8, "BOOL": 1,
             "F8_E4M3": 1, "U32": 4, "U16": 2, "I16": 2}  # fmt: skip
    nbytes = row["data_offsets"][1] - row["data_offsets"][0]
    dtype = rng.choice([key for key, size in sizes.items() if nbytes % size == 0])
    count = nbytes // sizes[dtype]
    half = next((d for d in (7, 5, 3, 2) if count % d == 0), 1)
    row["dtype"] = dtype
    row["shape"] = rng.choice(
        [[count], [count, 1], [1, count], [half, count // half], [1] * 40 + [count]]
    )
    return table


def _names(table: dict[str, Any], rng: Rng) -> Any:
    name, row = _rows(table, rng)
    what = rng.randrange(6)
    if what == 0:
        del table[name]
    elif what == 1:
        text = json.dumps(table).encode()
        return (
            text[:-1] + b", " + json.dumps(name).encode() + b": " + json.dumps(row).encode() + b"}"
        )
    elif what == 2:
        at = row["data_offsets"][1]
        table["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [at, at]}
    elif what == 3:
        table["__metadata__"] = rng.choice(WEIRD)
    else:
        new = rng.choice(
            ["", ".", "../x", "/etc/passwd", "\0", "\ud800", "a\nb", "x" * 100_000, "\x1b[2J",
             "model.layers.0", "model.layers.99999999999.mlp.up_proj.weight", "__x__",
             name.upper(), name + ".weight", name.replace("0", "-1")]
        )  # fmt: skip
        table[new] = table.pop(name)
    return table


def _raw_header(table: dict[str, Any], rng: Rng) -> bytes:
    text = json.dumps(table)
    return rng.choice(
        [
            b"", b"{}", b"[]", b"null", b"\xff" * 40, b" " * 100, b"[" * 100_000,
            b'{"a":' * 100_000 + b"1" + b"}" * 100_000, text.encode("utf-16"),
            text.encode("utf-8-sig"), b'{"a": NaN}', b'{"__metadata__": {}}',
            text.replace("F32", "\ud800").encode("utf-8", "surrogatepass"),
            text.encode() + b" " * 50_000, text.encode() + b"\0", b"1" * 10_000,
            text.replace("[", "[" + "9" * 6000 + ",", 1).encode(),
        ]
    )  # fmt: skip


def _length(file: Path, rng: Rng) -> None:
    data = file.read_bytes()
    now = int.from_bytes(data[:8], "little")
    new = rng.choice([0, 1, 2, now - 1, now + 1, now // 2, 2**63, 2**64 - 1, 2**32, len(data),
                      len(data) - 8, len(data) - 9, 10**8])  # fmt: skip
    file.write_bytes(new.to_bytes(8, "little") + data[8:])


def _values(file: Path, rng: Rng) -> None:
    """Other numbers in the body: NaN, infinity, zeros, noise."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    if start >= len(data):
        return
    begin = rng.randrange(start, len(data)) & ~3
    size = rng.choice([4, 64, 4096, len(data)])
    fill = rng.choice([b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\0\0\0\0", b"\x80\x7f\x80\xff",
                       rng.randbytes(4), b"\1\0\0\0"])  # fmt: skip
    end = min(len(data), max(begin, start) + size)
    data[max(begin, start) : end] = (fill * size)[: end - max(begin, start)]
    file.write_bytes(bytes(data))


def _index(file: Path, rng: Rng) -> None:
    """Where an index says that tensors are."""
    tree = json.loads(file.read_text())
    table = tree["weight_map"]
    name = rng.choice(sorted(table))
    what = rng.randrange(5)
    if what == 0:
        other = rng.choice(sorted(table))
        table[name], table[other] = table[other], table[name]
    elif what == 1:
        del table[name]
    elif what == 2:
        table["model.layers.0.extra.weight"] = table[name]
    else:
        table[name] = rng.choice(
            ["../x.safetensors", "/etc/passwd", "..", ".", "", "a/b", "\0", "x" * 5000, "\ud800",
             "~", "config.json", "a\\b", None, 3, [], {}, "%2e%2e/x", "nul", "model.safetensors/",
             "/dev/zero", "./" + table[name]]
        )  # fmt: skip
    file.write_text(json.dumps(tree))


#: Fields that size a model; a guard belongs before whatever allocates or loops by them.
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "head_dim",
          "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "num_experts",
          "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "pad_token_id",
          "eos_token_id", "rms_norm_eps", "sliding_window", "attention_dropout")  # fmt: skip
_FIELDS: tuple[tuple[str, Any], ...] = (
    ("dtype", "float64"), ("dtype", "float99"), ("dtype", 7), ("torch_dtype", "bfloat16"),
    ("architectures", ["Nonesuch"]), ("architectures", []), ("architectures", "x"),
    ("architectures", ["PreTrainedModel"]), ("architectures", ["logging"]),
    ("architectures", ["AutoModel"]), ("architectures", ["BertModel"]),
    ("auto_map", {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}),
    ("auto_map", {"AutoModelForCausalLM": "../../evil.X"}), ("auto_map", "x"),
    ("model_type", "bert"), ("model_type", "gpt2"), ("model_type", ""), ("model_type", None),
    ("model_type", ["llama"]), ("model_type", "../llama"), ("model_type", "mixtral"),
    ("quantization_config", {}), ("quantization_config", {"quant_method": "gptq"}),
    ("quantization_config", {"quant_method": "bitsandbytes"}), ("quantization_config", "x"),
    ("quantization_config", {"quant_method": ["x"]}), ("quantization", {"group_size": "x"}),
    ("rope_parameters", {"rope_type": "yarn"}), ("rope_parameters", {"rope_theta": "x"}),
    ("rope_parameters", []), ("rope_scaling", {"type": "nope", "factor": -1}),
    ("hidden_act", "nope"), ("hidden_act", None), ("layer_types", ["x"]), ("layer_types", []),
    ("layer_types", ["sliding_attention"] * 2), ("tie_word_embeddings", True),
    ("tie_word_embeddings", "x"), ("is_encoder_decoder", True), ("text_config", {}),
    ("text_config", "x"), ("use_cache", "x"), ("attention_bias", True), ("_name_or_path", 1),
    ("mlp_only_layers", "x"), ("num_local_experts", 2**40), ("transformers_version", None),
    ("attn_implementation", "nope"), ("_attn_implementation", "nope"), ("id2label", {"x": 1}),
    ("num_labels", 2**40),
)  # fmt: skip


def _config(tree: Any, rng: Rng) -> Any:
    if rng.random() < 0.5:
        sizes = [key for key in _SIZES if key in tree] or list(_SIZES)
        values = (0, -1, 1, 3, 7, 10**4, 2**31, 2**40, 10**30, 0.5, "x", None, [2], True, 1e300)
        tree[rng.choice(sizes)] = rng.choice(values)
    else:
        key, value = rng.choice(_FIELDS)
        tree[key] = value
    return tree


def _quantization(tree: Any, rng: Rng) -> Any:
    """The claims of a quantized directory."""
    own = tree.get("quantization_config") or tree.get("quantization")
    if not isinstance(own, dict):
        return _few(tree, rng)
    values = (0, -1, 3, 5, 9, 64, 10**12, 0.5, "x", None, [], {}, True, "gptq", "awq", "mlx")
    key = rng.choice([*own, "extra_config", "dynamic", "bits", "group_size", "quant_method"])
    own[key] = rng.choice(
        [*values, {"(": {"bits": 8}}, {"model.layers.0.mlp.up_proj": {"bits": "x"}},
         {"model.layers.0.mlp.up_proj": None}, {".*": []}, {"(a+)+$": {}}, ["model"]]
    )  # fmt: skip
    return tree


BYTES: dict[str, Mutation] = {
    "truncate": _truncated, "append": _longer, "flip": _flipped, "cut": _cut_out,
    "insert": _inserted, "noise": _noise, "swap": _swapped, "missing": _missing, "odd": _odd,
}  # fmt: skip
TREE: dict[str, Mutation] = {
    "few": _rewritten(_few), "other": _rewritten(_other_tree), "nest": _nested, "twice": _twice,
    "encode": _encoded,
}  # fmt: skip
CONFIG = {"config": _rewritten(_config), "claim": _rewritten(_quantization)}
SAFETENSORS: dict[str, Mutation] = {
    "offset": _header(_offset), "shape": _header(_shape), "dtype": _header(_dtype),
    "lie": _header(_lying), "name": _header(_names), "raw": _header(_raw_header),
    "length": _length, "values": _values,
}  # fmt: skip
ALL = BYTES | TREE | CONFIG | SAFETENSORS | {"index": _index}


def mutations(file: Path) -> list[str]:
    """Names of what can be done to a file, by its kind."""
    if file.suffix == ".safetensors":
        return [*SAFETENSORS, *SAFETENSORS, *BYTES]
    if file.name.endswith(".index.json"):
        return ["index"] * 8 + [*TREE, *BYTES]
    if file.name == "config.json":
        return [*CONFIG] * 5 + [*TREE, *BYTES]
    if file.suffix in (".json", ".jsonl") and file.parent.name != "journal":  # those are sealed
        return [*TREE, *TREE, *BYTES]
    return [*BYTES, "encode"]


# ---- running ----------------------------------------------------------------------------------


def draw(corpus: Path, seed: int, subjects: Sequence[str] = ()) -> str:
    """The case of a seed."""
    rng = random.Random(seed)
    rows = [SUBJECTS[name] for name in subjects] or list(SUBJECTS.values())
    subject = rng.choices(rows, [row.weight for row in rows])[0]
    file = rng.choice(sorted((corpus / subject.source).glob(subject.files)))
    name = file.relative_to(corpus / subject.source)
    return f"{subject.name}/{name}/{rng.choice(mutations(file))}/{seed}"


#: A case by its name, or a subject, a file of it and what is done to that.
Case = str | tuple[str, str, Callable[[Path], None]]


def run(corpus: Path, case: Case, seconds: float = SECONDS) -> Outcome:
    """One case in a child of its own."""
    if isinstance(case, str):
        name, _, rest = case.partition("/")
        file, mutation, seed = rest.rsplit("/", 2)
        damage = partial(ALL[mutation], rng=random.Random(int(seed)))
    else:
        name, file, damage = case
    subject = SUBJECTS[name]
    with tempfile.TemporaryDirectory(prefix="hostile") as folder:
        at = Path(folder) / "given"
        shutil.copytree(corpus / subject.source, at)
        damaged = at / file
        damage(damaged)
        places = {"at": at, "file": damaged, "out": Path(folder) / "out", "corpus": corpus}
        arguments = [word.format(**places) for word in subject.command.split()]
        started = time.monotonic()
        status, said, mebibytes = _forked(arguments, Path(folder) / "said", seconds)
        names = (damaged.name, str(at), *subject.words)
        kind, line = _judge(status, said, names)
        if mebibytes > RESIDENT >> 20:
            kind = "bomb"
        return Outcome(str(case), kind, line, round(time.monotonic() - started, 3), mebibytes)


def _forked(arguments: list[str], said: Path, seconds: float) -> tuple[int | None, str, int]:
    """Exit status (negative: the signal; None: out of time), output, and memory used above ours."""
    before = _status("VmRSS")
    pid = os.fork()
    if pid == 0:
        _child(arguments, said)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.004)
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None, said.read_text(errors="replace") if said.exists() else "", 0
    return os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), max(
        0, (usage.ru_maxrss * 1024 - before) >> 20)  # fmt: skip


def _child(arguments: list[str], said: Path) -> None:
    code = 70
    try:
        from autoround import cli
        from autoround.run import failure

        # An unexpected error is one line to users; here we want to know where it came from.
        failure.unexpected = _unexpected
        failure.Recorder.bundle = lambda _, error, *rest: _unexpected(error)  # type: ignore
        file = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        limit = _status("VmSize") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["autoround", *arguments]
        cli.run(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _unexpected(error: BaseException, *rest: Any) -> Any:
    traceback.print_exception(error)
    return ""


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _judge(status: int | None, said: str, names: Sequence[str]) -> tuple[str, str]:
    """Kind of outcome, and the line that tells most."""
    lines = said.splitlines()
    last = lines[-1] if lines else ""
    if status is None:
        return "hang", last
    if status < 0:
        return f"crash {-status}", last
    if "Traceback (most recent call last)" in said:
        place = [line.strip() for line in lines if line.startswith("  File ")]
        ours = [line for line in place if "/autoround/" in line and "tests" not in line]
        return "traceback", f"{last[:300]} @ {(ours or place or [''])[-1]}"
    if status == 0:
        return "accepted", last
    if status == 1 and "NOT VERIFIED" in said:
        return "found", next(line for line in lines if "NOT VERIFIED" in line)
    errors = [line for line in lines if line.startswith("error: ")]
    if status != 2 or len(errors) != 1:
        return "mute", f"status {status}: {said[-300:]!r}"
    line = errors[0]
    odd = {c for c in line if not c.isprintable()}
    if odd or len(line) > 900:
        return "mute", f"{len(line)} characters, {sorted(odd)!r}: {line[:200]!r}"
    return ("refused" if any(name in line for name in names) else "nameless"), line


def campaign(corpus: Path, cases: Sequence[Case]) -> list[Outcome]:
    """Every case; the heavy imports are done once, here, for all children."""
    import torch

    torch.set_num_threads(1)  # a forked child cannot use threads that its parent has started
    import autoround

    for module in pkgutil.walk_packages(autoround.__path__, "autoround."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("pyarrow.parquet", "transformers.models.auto.modeling_auto", "hal.backends"):
        importlib.import_module(name)
    os.environ["XDG_CACHE_HOME"] = str(corpus / "cache")
    return [run(corpus, case) for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--subject", action="append", default=[], help="only these, by prefix")
    parser.add_argument("--only", action="append", default=[], help="this case")
    parser.add_argument("--corpus", type=Path, help="made there once, or taken from there")
    parser.add_argument("--json", type=Path, help="every outcome")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory(prefix="corpus") as folder:
        corpus = given.corpus or Path(folder)
        if not (corpus / "run").is_dir():
            make_corpus(corpus)
        wanted = [n for n in SUBJECTS if any(n.startswith(s) for s in given.subject)]
        seeds = range(given.seed, given.seed + given.cases)
        cases = given.only or [draw(corpus, seed, wanted) for seed in seeds]
        outcomes = campaign(corpus.resolve(), cases)
    if given.json:
        given.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=0))
    _print(outcomes, verbose=bool(given.only))
    sys.exit(any(o.kind not in GOOD for o in outcomes))


def _print(outcomes: Sequence[Outcome], *, verbose: bool) -> None:
    kinds = sorted({o.kind for o in outcomes}, key=lambda k: (k not in GOOD, k))
    table: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        table.setdefault(outcome.case.partition("/")[0], Counter())[outcome.kind] += 1
    print("| subject | " + " | ".join(kinds) + " |\n|---|" + "---|" * len(kinds))
    total: Counter[str] = sum(table.values(), Counter())
    for name, row in [*sorted(table.items()), ("all", total)]:
        print(f"| {name} | " + " | ".join(str(row[k]) for k in kinds) + " |")
    if not outcomes:
        return
    slow = max(outcomes, key=lambda o: o.seconds)
    print(f"slowest {slow.seconds} s ({slow.case}), most memory "
          f"{max(o.mebibytes for o in outcomes)} MiB")  # fmt: skip
    for outcome in outcomes:
        if verbose or outcome.kind not in GOOD:
            shown = "".join(c if c in string.printable else "?" for c in outcome.line)
            print(f"{outcome.kind}  {outcome.case}\n    {shown[:400]}")


if __name__ == "__main__":
    main()
