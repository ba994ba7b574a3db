# SPDX-License-Identifier: Apache-2.0
"""Input that cannot succeed: one line that names it and a remedy, code 2, and nothing touched."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from autoround import cli

PGDOC = Path(__file__).parents[2] / "benchmarks/models/pgdoc"
RTN = ("--iters", "0", "--group-size", "32")
TUNE = ("--iters", "2", "--nsamples", "4", "--seqlen", "16", "--batch-size", "2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = zoo.save(name, tmp_path_factory.mktemp(name) / name)
        return made[name]

    return get


@pytest.fixture
def model(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A llama checkpoint to damage."""
    shutil.copytree(saved("llama"), tmp_path / "model")
    return tmp_path / "model"


Refused = Callable[..., None]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs `autoround quantize`; wants code 2, one line with the words, and no trace on disk."""

    def check(source: Path | str, *arguments: str, words: list[str], output: str = "") -> None:
        before = snapshot(tmp_path)
        capsys.readouterr()
        target = output or str(tmp_path / "out")
        with pytest.raises(SystemExit) as end:
            cli.run(["quantize", str(source), "-o", target, *arguments])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
        assert end.value.code == 2, captured.err
        assert len(lines) == 1, captured.err
        assert "Traceback" not in captured.err
        for word in words:
            assert word in lines[0], lines[0]
        assert snapshot(tmp_path) == before

    return check


def snapshot(path: Path) -> dict[str, Any]:
    """Every file below with its bytes; directories as None."""
    found = sorted(path.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in found}


# ---- the checkpoint --------------------------------------------------------------------------


def test_missing_path(tmp_path: Path, refused: Refused) -> None:
    refused(tmp_path / "nowhere", words=["nowhere does not exist", "model directory or a hub id"])


def test_a_file_instead_of_a_directory(model: Path, refused: Refused) -> None:
    file = model / "config.json"
    refused(file, words=["config.json is a file", "the model directory"])


def test_not_a_checkpoint(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", words=["has no config.json", "give the model directory"])
    (tmp_path / "empty/config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path / "empty", words=["holds no *.safetensors", "download it again"])


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def cut_in_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def garbage_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:20] = b"\xff" * 12
    file.write_bytes(bytes(data))


def huge_header(file: Path) -> None:
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "word"),
    [(truncate, "truncated"), (cut_in_header, "truncated or corrupt"), (garbage_header, "corrupt"),
     (huge_header, "corrupt"), (empty, "truncated or corrupt")],
)  # fmt: skip
def test_damaged_file(
    damage: Callable[[Path], None], word: str, model: Path, refused: Refused
) -> None:
    damage(model / "model.safetensors")
    refused(model, *RTN, words=["model.safetensors", word, "download it again"])


@pytest.mark.parametrize("tuned", [False, True], ids=["rtn", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers(
    name: str, value: float, tuned: bool, model: Path, tmp_path: Path, refused: Refused
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "ids.jsonl").write_text(token_rows())
    options = (*TUNE, "--dataset", str(tmp_path / "ids.jsonl")) if tuned else RTN
    refused(model, *options, words=[name, "1 NaN or infinite", "repair the checkpoint"])


def token_rows(largest: int = 100, rows: int = 8) -> str:
    lines = [[(7 * i + j) % largest + 3 for j in range(32)] for i in range(rows)]
    return "".join(json.dumps({"input_ids": line}) + "\n" for line in lines)


def test_missing_tensor(model: Path, refused: Refused) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(model, *RTN, words=["lacks model.layers.1.mlp.up_proj.weight", "download it again"])


def test_config_of_another_size(model: Path, refused: Refused) -> None:
    config = json.loads((model / "config.json").read_text())
    config["intermediate_size"] = 128
    (model / "config.json").write_text(json.dumps(config))
    refused(model, *RTN, words=["wants shape (64, 128)", "download it again"])


def test_unknown_architecture(model: Path, refused: Refused) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "nonesuch", "architectures": ["NoneSuch"]}
    (model / "config.json").write_text(json.dumps(config))
    # rounding alone would need no model: tests/autoround/test_stream.py
    refused(model, "--iters", "1", words=["nonesuch", "update transformers"])


def test_config_that_is_no_json(model: Path, refused: Refused) -> None:
    (model / "config.json").write_text("{")
    refused(model, *RTN, words=["config.json is not readable JSON", "download it again"])


def test_pickles_are_not_opened(model: Path, refused: Refused) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(
        model, *RTN, words=["only pickled weights", "pytorch_model.bin", "safetensors revision"]
    )


def test_float64(tmp_path: Path, refused: Refused) -> None:
    source = zoo.save("qwen3", tmp_path / "f64", dtype=torch.float64)
    refused(source, *RTN, words=["torch.float64", "bfloat16 or float32 first"])


def test_already_quantized(model: Path, tmp_path: Path, refused: Refused) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(["quantize", str(model), "-o", str(tmp_path / "q"), *RTN, "-q"])
    assert not end.value.code
    refused(tmp_path / "q", *RTN, words=["already quantized (auto-round)", "original checkpoint"])


# ---- choices ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scheme", "W4A4"], ["unknown scheme 'W4A4'", "list schemes", "W4A16"]),
        (["--format", "gguf"], ["unknown format 'gguf'", "auto_round:auto_awq"]),
        (["--format", "auto_round,gptq"], ["unknown format 'gptq'", "choose one of"]),
        (["--recipe", "fast"], ["unknown recipe 'fast'", "autoround, best, light"]),
        (["--bits", "9"], ["bits=9", "2 to 8"]),
        (["--group-size", "8"], ["group_size=8", "at least 16"]),
        (["--group-size", "0"], ["group_size=0", "-1 (whole row)"]),
        (["--iters", "-5"], ["iters=-5", "0 or more"]),
        (["--lr", "nan"], ["lr=nan", "number of 0 or more"]),
        (["--max-shard-size", "5 apples"], ["max_shard_size='5 apples'", "5GB"]),
        (["--budget", "30"], ["budget='30'", "write it like 90s, 30m or 2h"]),
        (["--target-kl", "0.1", "--nsamples", "8"], ["choose the samples; leave nsamples out"]),
        (["--recipe", "rtn", "--budget", "1m"], ["grow the samples of the closed form"]),
        (["--recipe", "autoround", "--nblocks", "2"], ["nblocks=2", "use --recipe signround"]),
        (["--device-map", "0,1"], ["device '1' is not on this machine", "choose auto or"]),
        (["--device-map", "tpu:9"], ["device 'tpu:9' is not on this machine", "choose auto or"]),
        ([*RTN, "--nsamples", "8"], ["nsamples has no effect", "leave it out, or give --iters"]),
        ([*RTN, "--ignore-layers", "layers.7"], ["'layers.7' matches no layer", "model.layers.0"]),
        ([*RTN, "--layer-config", "{nope:{bits:8}}"], ["'nope' matches no layer", "look like"]),
        ([*RTN, "--layer-config", "{k_proj:{bts:8}}"], ["k_proj", "unknown field ['bts']", "bits"]),
        ([*RTN, "--layer-config", "{k_proj:{bits:12}}"], ["bits=12", "2 to 8"]),
        ([*RTN, "--layer-config", "{k_proj"], ["layer_config '{k_proj' is not JSON", "write e.g."]),
        ([*RTN, "--layer-config", "no.json"], ["no.json does not exist"]),
        ([*RTN, "--ignore-layers", "("], ["'(' is not a regular expression"]),
        ([*RTN, "--ignore-layers", "layers"], ["no layer would be quantized", "--ignore-layers"]),
        (
            [*RTN, "--format", "auto_round:auto_gptq", "--asym"],
            ["auto_round:auto_gptq cannot hold", "use --format auto_round"],
        ),
        (
            [*RTN, "--format", "auto_round:auto_awq", "--bits", "8"],
            ["auto_round:auto_awq cannot hold", "4 bits, not 8", "use --format auto_round"],
        ),
        (
            [*RTN, "--format", "auto_round:auto_awq", "--layer-config", "{k_proj:{bits:3}}"],
            ["4 bits, not 3"],
        ),
    ],
    ids=lambda value: " ".join(value[-2:]) if value[0].startswith("-") else "",
)  # fmt: skip
def test_choice(options: list[str], words: list[str], model: Path, refused: Refused) -> None:
    refused(model, *options, words=words)


def test_group_that_fits_no_layer(model: Path, refused: Refused) -> None:
    """17 divides neither 64 nor 96 columns, and no smaller group is tried below it."""
    words = ["no layer would be quantized", "not a multiple of group_size 17"]
    refused(model, "--iters", "0", "--group-size", "17", words=words)


# ---- the output ------------------------------------------------------------------------------


def test_output_that_is_not_empty(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("kept")
    refused(model, *RTN, words=["out exists and is not empty", "choose a new directory with -o"])


def test_output_that_is_a_file(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "out").write_text("kept")
    refused(model, *RTN, words=["out exists and is not empty", "-o"])


def test_output_onto_the_source(model: Path, refused: Refused) -> None:
    refused(model, *RTN, output=str(model), words=["is not empty", "-o"])


@pytest.mark.parametrize("place", ["below a file", "/proc", "/sys/fs"])
def test_output_that_cannot_be_written(
    place: str, model: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "file").write_text("x")
    parent = tmp_path / "file" if place == "below a file" else Path(place)
    words = [f"cannot write to {parent}", "choose another -o"]
    refused(model, *RTN, output=str(parent / "out"), words=words)


def test_two_names_for_the_output(model: Path, tmp_path: Path, refused: Refused) -> None:
    refused(model, *RTN, "--output-dir", str(tmp_path), words=["-o", "--output-dir", "not both"])


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 64 KiB (the model wants 120). Needs root, as in the project's container."""
    where = Path(tempfile.mkdtemp())
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(where)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    if not mounted:
        where = where / "without mount"
    yield where
    if mounted:
        subprocess.run(["umount", str(where)], check=True)
    shutil.rmtree(where, ignore_errors=True)


def test_full_disk(
    model: Path, small_disk: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small_disk.exists():  # may not mount: let the system call answer as a full disk does

        def full(*_: Any) -> None:
            raise OSError(28, os.strerror(28))

        small_disk.mkdir()
        monkeypatch.setattr(os, "posix_fallocate", full)
    words = ["cannot hold 0.00 GB", "No space left on device", "free some space", "another -o"]
    refused(model, *RTN, output=str(small_disk / "out"), words=words)
    assert not list(small_disk.iterdir())


# ---- calibration data ------------------------------------------------------------------------


def test_dataset_too_small(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "ids.jsonl").write_text(token_rows(rows=2))
    words = ["gives 2 samples of 32 tokens", "4 were asked for", "--nsamples 2"]
    options = ("--iters", "2", "--nsamples", "4", "--seqlen", "32")
    dataset = ("--dataset", str(tmp_path / "ids.jsonl"))
    refused(model, *options, *dataset, words=words)


def test_dataset_missing(model: Path, tmp_path: Path, refused: Refused) -> None:
    gone = str(tmp_path / "gone.jsonl")
    refused(model, *TUNE, "--dataset", gone, words=["gone.jsonl", "does not exist"])


def test_text_without_a_tokenizer(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "text.txt").write_text("A sentence of words. " * 200)
    words = ["is text and there is no tokenizer", "pass the model's tokenizer", "input_ids"]
    refused(model, *TUNE, "--dataset", str(tmp_path / "text.txt"), words=words)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2"])
def test_made_up_tokenizers_count_as_none(
    name: str, saved: Callable[[str], Path], refused: Refused
) -> None:
    """For some families transformers invents a tokenizer of five special tokens."""
    refused(saved(name), *TUNE, words=["is text and there is no tokenizer"])


def test_token_ids_need_no_tokenizer(model: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text(token_rows())
    dataset = ("--dataset", str(tmp_path / "ids.jsonl"))
    with pytest.raises(SystemExit) as end:
        cli.run(["quantize", str(model), "-o", str(tmp_path / "out"), *TUNE, *dataset])
    assert not end.value.code
    assert (tmp_path / "out/config.json").is_file()


def test_tokens_beyond_the_embeddings(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "ids.jsonl").write_text(token_rows(largest=500, rows=60))
    words = ["outside the model's 128 embeddings", "belong to another model"]
    refused(model, *TUNE, "--dataset", str(tmp_path / "ids.jsonl"), words=words)


# ---- eval ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere/at/all", "--against", "MODEL"], ["nowhere/at/all does not exist"]),
        (["MODEL", "--against", "nowhere/at/all"], ["nowhere/at/all does not exist"]),
        (["MODEL", "--against", "MODEL"], ["no tokenizer that loads", "evaluation needs one"]),
        (["PGDOC", "--against", "PGDOC", "--device-map", "tpu"], ["device 'tpu' is not on this"]),
        (["PGDOC", "--against", "PGDOC", "--nsamples", "0"], ["nsamples=0"]),
    ],
)
def test_eval(
    arguments: list[str], words: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": str(model), "PGDOC": str(PGDOC)}
    with pytest.raises(SystemExit) as end:
        cli.run(["eval", *(places.get(a, a) for a in arguments)])
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert end.value.code == 2
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines


def test_nothing_was_computed_before_the_refusals(
    model: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The guard on this file itself: a refused choice never reaches a block."""

    def never(*_: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("autoround.run.stream._Rounding.all", never)
    refused(model, *RTN, "--ignore-layers", "nope", words=["matches no layer"])
    with pytest.raises(SystemExit):
        cli.run(["quantize", str(model), "-o", str(model.parent / "out"), *RTN])
    assert "work was done" in capsys.readouterr().err
