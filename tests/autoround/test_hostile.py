# SPDX-License-Identifier: Apache-2.0
"""Broken and hostile files: one clear line, code 2, in little time and memory; never a traceback.

The rows are what was found by `hostile.py`, each once, and what an attacker would try first; then
random cases of the same machine.
"""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
from hostile import Outcome

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in a process of its own: children are forked from one that has started no threads."""
    path = tmp_path_factory.mktemp("corpus")
    _campaign(path, "--cases", "0")
    return path


def _campaign(corpus: Path, *arguments: str) -> list[Outcome]:
    """Cases in a process of their own."""
    out = corpus / "outcomes.json"
    command = [
        sys.executable,
        str(HERE / "hostile.py"),
        "--corpus",
        str(corpus),
        "--json",
        str(out),
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert out.is_file(), done.stderr
    return [Outcome(**row) for row in json.loads(out.read_text())]


def _wrong(outcomes: list[Outcome]) -> list[str]:
    return [f"{o.kind}: {o.case}: {o.line}" for o in outcomes if o.kind not in hostile.GOOD]


# ---- rows --------------------------------------------------------------------------------------


def header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Another header over the same body."""

    def damage(file: Path) -> None:
        data = file.read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        table = json.loads(data[8:end])
        made = change(table)
        head = made if isinstance(made, bytes) else json.dumps(made or table).encode()
        file.write_bytes(struct.pack("<Q", len(head)) + head + data[end:])

    return damage


def setting(**values: object) -> Callable[[Path], None]:
    """Other settings in a JSON file; ``a__b``: inside of one."""

    def damage(file: Path) -> None:
        tree = json.loads(file.read_text())
        for key, value in values.items():
            *outer, last = key.split("__")
            part = tree
            for step in outer:
                part = part[step]
            part[last] = value
        file.write_text(json.dumps(tree))

    return damage


def text(content: str | bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(content.encode() if isinstance(content, str) else content)


def ids(first: int) -> Callable[[Path], None]:
    """Enough rows of token ids."""
    return text((json.dumps({"input_ids": [first, *range(3, 33)]}) + "\n") * 20)


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def link(target: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink(missing_ok=True)
        file.symlink_to(target)

    return damage


def terabyte(file: Path) -> None:
    os.truncate(file, 1 << 40)


def first(table: dict) -> dict:
    return next(row for name, row in table.items() if name != "__metadata__")


def zeros_of_experts(table: dict) -> None:
    """A billion experts that take no bytes."""
    end = max(row["data_offsets"][1] for name, row in table.items() if name != "__metadata__")
    row = {"dtype": "F32", "shape": [10**9, 0, 4], "data_offsets": [end, end]}
    table["model.layers.0.mlp.switch_mlp.up_proj.scales"] = row


def twice(table: dict) -> bytes:
    name = next(reversed(table))
    return f"{json.dumps(table)[:-1]}, {json.dumps(name)}: {json.dumps(table[name])}}}".encode()


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
WHERE = "weight_map__model.norm.weight"
MODULE = "model.layers.0.mlp.up_proj"
#: What a matcher that backtracks does not come to an end with.
SLOW = r"(?:(?:\w+\.?)+)+!"
RULES = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"}

#: subject, damaged file, damage, words of the line
ROWS = [
    ("quantize file", "model.safetensors", pipe, "no ordinary file"),
    ("quantize file", "model.safetensors", terabyte, "truncated or overlong"),
    ("quantize file", "model.safetensors", link("/dev/zero"), "no ordinary file"),
    ("quantize file", "model.safetensors", header(lambda t: DEEP.encode()), "nested too deeply"),
    ("quantize file", "model.safetensors", header(twice), "is there twice"),
    ("quantize file", "model.safetensors", header(lambda t: t | {"x\x1b[2J": first(t)}), "no name"),
    ("quantize file", "model.safetensors", header(lambda t: t | {"x" * 2000: first(t)}), "no name"),
    ("quantize file", "model.safetensors", header(lambda t: t | {"__metadata__": [1]}), "metadata"),
    ("quantize file", "model.safetensors", header(lambda t: first(t).update(shape=[1] * 100)),
     "header row"),
    ("quantize file", "model.safetensors", text(b"\xff" * 7 + b"\x7f" + b"{}" * 9), "no header"),
    ("quantize index", "model.safetensors.index.json", setting(**{WHERE: "../../x.safetensors"}),
     "outside the directory or no name of a safetensors file"),
    ("quantize index", "model.safetensors.index.json", setting(**{WHERE: "/etc/passwd"}),
     "outside the directory"),
    ("quantize index", "model.safetensors.index.json", setting(**{WHERE: "x" * 500}), "no name"),
    ("quantize index", "model.safetensors.index.json", text(DEEP), "nested too deeply"),
    ("quantize config", "config.json", text(DEEP), "nested too deeply"),
    ("quantize config", "config.json", terabyte, "more than the 0.1 GB"),
    ("quantize config", "config.json", setting(num_hidden_layers=10**9), "layers = 1e+09"),
    ("quantize config", "config.json", setting(num_attention_heads=0), "config.json"),
    ("quantize config", "config.json", setting(hidden_size=[2]), "config.json"),
    ("quantize config", "tokenizer.json", link("/etc/passwd"), "is a link to /etc/passwd"),
    ("quantize config", "LICENSE", link("/etc/shadow"), "is a link to /etc/shadow"),
    ("quantize config", "tokenizer.json", terabyte, "1.1e+03 GB"),
    ("tune config", "config.json", setting(model_type="evil", auto_map=RULES),
     "it would run configuration_evil.py, modeling_evil.py"),
    ("tune config", "config.json", setting(architectures=["logging"]), None),
    ("tune config", "config.json", setting(architectures="x", model_type="qwen3_moe"), "config"),
    ("tune config", "config.json", setting(rope_parameters={"rope_theta": 0.0}), "NaN"),
    ("tune experts", "config.json", setting(num_experts=10**6), "num_experts = 1e+06"),
    ("tune config", "config.json", setting(layer_types=["sliding_attention"] * 2),
     "Qwen3ForCausalLM does not run with it"),
    ("eval float", "config.json", setting(num_labels=2**40), "num_labels = 1.09951e+12"),
    ("tune experts", "config.json", setting(num_experts_per_tok=5), "top_k = 5 of num_experts = 4"),
    ("plan", "config.json", setting(text_config="x"), "text_config is 'x'"),
    ("plan", "config.json", setting(num_hidden_layers=0), "given: LlamaForCausalLM has no list"),
    ("tune tokenizer", "tokenizer.json", text(DEEP), "tokenizer.json is not readable JSON"),
    ("tune tokenizer", "tokenizer_config.json", setting(model_max_length=[1]), "tokenizer"),
    ("layer config", "layers.json", text(b"\xff\xfe{}"), "layers.json is not readable JSON"),
    ("layer config", "layers.json", text(DEEP), "nested too deeply"),
    ("layer config", "layers.json", setting(k_proj=3), "neither the name of a scheme"),
    ("layer config", "layers.json", setting(k_proj={"bits": "8"}), "bits='8' is no int"),
    ("layer config", "layers.json", setting(k_proj={"bits": 8, "sym": 1}), "sym=1 is no bool"),
    ("dataset", "rows.jsonl", text(DEEP), "line 1, is not readable JSON (nested too deeply)"),
    ("dataset", "texts.json", text(DEEP), "nested too deeply"),
    ("dataset", "rows.jsonl", terabyte, "give a part of it"),
    ("dataset", "rows.jsonl", text('{"text": "\\ud800 the cat sat on the mat"}\n' * 20),
     "surrogates not allowed"),
    ("dataset", "ids.jsonl", ids(2**63), "no token id"),
    ("eval dataset", "ids.jsonl", ids(320), "outside the model's 320 embeddings"),
    ("convert awq", "config.json", setting(quantization_config__modules_to_not_convert=3),
     "modules_to_not_convert in quant"),
    ("convert ct", "config.json", setting(quantization_config__config_groups={"g": 1}),
     "config_groups"),
    ("convert mlx", "config.json", setting(quantization="x"), "quantization is 'x'"),
    ("convert mlx", "model.safetensors", header(zeros_of_experts), None),
    ("convert canonical", "autoround.json", setting(contents__modules={MODULE: []}),
     "does not describe the weights"),
    ("convert canonical", "autoround.json", text(DEEP), "nested too deeply"),
    ("verify gptq", "config.json", setting(quantization_config__dynamic={"(": {}}), None),
    ("verify gptq", "config.json", setting(quantization_config__dynamic=[1]), None),
    ("verify gptq", "config.json", setting(quantization_config__dynamic={SLOW: {}}), None),
    ("verify gptq", "config.json",
     setting(quantization_config__dynamic={f"{i}.*": {} for i in range(70_000)}), "differences"),
    ("verify gptq", "config.json", setting(quantization_config__dynamic={"(.)\\1": {}}), "differ"),
    ("verify ct", "config.json", setting(quantization_config__ignore=["re:" + SLOW]), None),
    ("layer config", "layers.json", setting(**{SLOW: "W8A16"}), "matches no layer"),
    ("load mlx", "config.json", setting(architectures=["AutoModel"]), None),
    ("load mlx", "config.json", setting(quantization__bits={}), "bits in quantization is {}"),
    ("load fake", "config.json", setting(vocab_size=2**40), "config.json"),
    ("load awq", "config.json", setting(intermediate_size=3), "config.json wants 3"),
    ("report", "auto_awq/autoround.json", setting(blocks=[3]), "does not describe its blocks"),
    ("report", "README.md", pipe, "no ordinary file"),
    ("report", "autoround.log", link("/proc/self/mem"), None),
    ("resume", "journal/run.json", terabyte, "more than the 0.1 GB"),
    ("resume", "journal/00000.json", pipe, "no ordinary file"),
    ("resume", "model.safetensors.partial", terabyte, "is not the file that the run began"),
]  # fmt: skip


def _id(row: tuple[str, str, object, object]) -> str:
    return f"{row[0]} {row[1]}"


@pytest.fixture(scope="module")
def rows(corpus: Path) -> list[Outcome]:
    """Every row, in one process."""
    code = """
import json, sys
sys.path.insert(0, sys.argv[2])
import pathlib, hostile, test_hostile
cases = [(subject, file, damage) for subject, file, damage, _ in test_hostile.ROWS]
found = hostile.campaign(pathlib.Path(sys.argv[1]), cases)
print(json.dumps([[o.kind, o.line] for o in found]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(corpus), str(HERE)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    return [Outcome(_id(row), *found, 0, 0) for row, found in zip(ROWS, outcomes, strict=True)]


@pytest.mark.parametrize("index", range(len(ROWS)), ids=map(_id, ROWS))
def test_row(index: int, rows: list[Outcome]) -> None:
    outcome, (_, _, _, words) = rows[index], ROWS[index]
    assert not _wrong([outcome])
    if words is not None:
        assert outcome.kind in ("refused", "found"), outcome
        assert words in outcome.line


# ---- random cases ------------------------------------------------------------------------------


def test_random_cases(corpus: Path) -> None:
    outcomes = _campaign(corpus, "--cases", "110", "--seed", "1")
    assert len(outcomes) == 110
    assert not _wrong(outcomes)
    assert sum(o.kind == "refused" for o in outcomes) > 25


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100_000, 103_000, 500))
def test_many_random_cases(seed: int, corpus: Path) -> None:
    assert not _wrong(_campaign(corpus, "--cases", "500", "--seed", str(seed)))


def test_the_machine_sees_what_is_wrong(tmp_path: Path) -> None:
    """The guard on this file: every wrong kind of outcome is told from the good ones."""
    lines = {
        "refused": (2, "error: /x/config.json is broken; download it again"),
        "nameless": (2, "error: something is broken"),
        "mute": (2, "error: config.json: one\nerror: config.json: two"),
        "traceback": (1, "Traceback (most recent call last):\nKeyError: 'a'"),
        "crash 11": (-11, ""),
        "hang": (None, ""),
    }
    for kind, (status, said) in lines.items():
        assert hostile._judge(status, said, ("config.json",))[0] == kind
    assert hostile._judge(1, "error: config.json", ("config.json",))[0] == "mute"
    assert hostile._judge(2, "error: config.json \x1b[2J", ("config.json",))[0] == "mute"
    assert re.fullmatch(r"[\w ]+/.+/\w+/7", hostile.draw(_listed(tmp_path), 7))


def _listed(root: Path) -> Path:
    """A corpus by names alone."""
    for subject in hostile.SUBJECTS.values():
        name = subject.files.replace("*.*", "config.json").replace("*s.", "rows.").replace("*", "a")
        file = root / subject.source / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root
