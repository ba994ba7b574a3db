# SPDX-License-Identifier: Apache-2.0
"""The command line, as a process where that matters, else in this one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
import zoo

import autoround
from autoround import cli
from autoround.calib import load_tokens, pack
from autoround.errors import InputError
from autoround.familiar import notes, translate

ROOT = Path(__file__).parents[2]
PGDOC = ROOT / "benchmarks/models/pgdoc"


def process(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, "-m", "autoround", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def here(*arguments: str) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as end:
        cli.run(list(arguments))
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("llama", tmp_path_factory.mktemp("llama") / "llama")


def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(PGDOC)


@torch.no_grad()
def perplexity(path: Path, ids: torch.Tensor) -> float:
    """Of a directory on token rows, sample by sample: in bf16 a batch gives slightly other sums."""
    model = autoround.load(path)
    nll = []
    for row in ids:
        p = model(row[None]).logits[0, :-1].double().softmax(-1)
        nll.append(-p.gather(1, row[1:, None]).log())
    return float(torch.cat(nll).mean().exp())


# ---- processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("--help",), ("quantize", "--help"), ("--version",)])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = process(*arguments, python=("-X", "importtime"))
    assert done.returncode == 0
    assert done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"autoround.cli", "typer"} <= imported
    assert not {"torch", "transformers", "numpy", "safetensors", "hal"} & imported


def test_quantize_and_eval(tmp_path: Path) -> None:
    """The whole way on the bundled model: files, summary, and a comparison that makes sense."""
    out = tmp_path / "out"
    done = process(
        "quantize", str(PGDOC), "-o", str(out), "--group-size", "32", "--iters", "4",
        "--nsamples", "8", "--seqlen", "64", "--batch-size", "4", "--end-to-end", "1",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "auto_round:auto_gptq" in done.stdout
    assert "autoround eval" in done.stdout
    assert json.loads((out / "autoround.json").read_text())["recipe"]["iters"] == 4
    log = [json.loads(line) for line in (out / "autoround.log").read_text().splitlines()]
    forecast = next(line for line in log if line["event"] == "forecast")
    assert forecast["nbytes"] == sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    finished = next(line for line in log if line["event"] == "finished")
    assert finished["peak_bytes"] == pytest.approx(forecast["ram"], rel=0.25)
    done = process("eval", str(out), "--against", str(PGDOC), "--nsamples", "4", "--seqlen",
                   "128", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["quantized_layers"] == len(oracle.packed_modules(oracle.read(out)))
    assert found["nbytes"] == (out / "model.safetensors").stat().st_size
    assert found["float_nbytes"] == (PGDOC / "model.safetensors").stat().st_size
    compared = found["comparison"]
    assert compared["tokens"] == 4 * 127
    ids = load_tokens(pack.heldout(), tokenizer(), nsamples=4, seqlen=128, seed=0).ids
    assert compared["float_perplexity"] == pytest.approx(perplexity(PGDOC, ids), rel=5e-3)
    assert compared["perplexity"] == pytest.approx(perplexity(out, ids), rel=5e-3)
    assert abs(compared["perplexity"] / compared["float_perplexity"] - 1) < 0.1
    assert 0 < compared["kl_median"] <= compared["kl_p99"]
    assert 0 < compared["kl"] < 0.1
    assert 0.8 < compared["same_top"] < 1
    assert found["speed"] > 0


def test_errors_are_one_line_and_code_2(tmp_path: Path) -> None:
    done = process("quantize", str(tmp_path / "nowhere"), "-o", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: {tmp_path}/nowhere does not exist; give a model directory or a hub id such as "
        "org/name"
    ]


# ---- in this process -------------------------------------------------------------------------


def test_eval_of_the_float_model_itself(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--nsamples", "2", "--seqlen", "64", "--json")
    assert here("eval", str(PGDOC), "--against", str(PGDOC), *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantized_layers"] == 0
    compared = found["comparison"]
    assert compared["perplexity"] == compared["float_perplexity"]
    assert compared["kl"] == 0
    assert compared["same_top"] == 1


@pytest.mark.parametrize(
    ("what", "words"),
    [("schemes", ["W4A16", "W8A16G32", "BF16"]), ("formats", ["auto_round:auto_awq"]),
     ("recipes", ["autoround", "rtn", "512"]), ("devices", ["cpu", "reference"])],
)  # fmt: skip
def test_list(what: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert here("list", what) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words)


@pytest.mark.parametrize(
    "arguments",
    [("quantize", "m", "--no-such-option"), ("quantize",), ("list", "nothing"), ("nonsense",),
     ("quantize", "m", "--bits", "four"), ("eval", "m")],
    ids=" ".join,
)  # fmt: skip
def test_usage_errors(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert here(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Error:" in captured.err


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    here()
    captured = capsys.readouterr()
    assert "quantize" in captured.out + captured.err


def test_spellings_with_underscores(llama: Path, tmp_path: Path) -> None:
    arguments = ("--recipe", "rtn", "--group_size", "32", "--ignore_layers", "layers.0",
                 "--layer_config", "{k_proj:{bits:8}}", "--output_dir", str(tmp_path / "p"),
                 "--max_shard_size", "1MB", "--quant_lm_head", "--asym")  # fmt: skip
    assert here("quantize", str(llama), *arguments) == 0
    own = oracle.config(tmp_path / "p/llama-w4g32")["quantization_config"]
    assert own["sym"] is False
    assert oracle.scheme_of(own, "model.layers.1.self_attn.k_proj") == (8, 32, False)
    assert oracle.scheme_of(own, "model.layers.0.mlp.up_proj")[0] == 16
    assert oracle.scheme_of(own, "lm_head") == (4, 32, False)


def test_quiet(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("-o", str(tmp_path / "out"), "--iters", "0", "--group-size", "32", "-q")
    assert here("quantize", str(llama), *arguments) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "out/config.json").is_file()


def test_interrupted(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoround.run.stream._Rounding.all", stop)
    assert here("quantize", str(llama), "-o", str(tmp_path / "out"), "--iters", "0") == 130
    assert "error: stopped; nothing was left behind" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- familiar commands -----------------------------------------------------------------------

HOME = ["--output_dir", "tmp_autoround"]


@pytest.mark.parametrize(
    ("given", "own"),
    [
        (["--model", "M"], ["M", *HOME]),
        (["--model=M"], ["M", *HOME]),
        (["M"], ["M", *HOME]),
        (["M", "--low_gpu_mem_usage", "--enable_torch_compile"], ["M", *HOME]),
        (["M", "--bits", "3"], ["M", *HOME, "--bits", "3"]),
        (["--model_name_or_path", "M", "--asym"], ["M", *HOME, "--asym"]),
        (
            ["--bits", "2", "--model", "M", "--group_size=32"],
            ["M", *HOME, "--bits", "2", "--group_size", "32"],
        ),
        (
            ["--model=M", "--output_dir=out"],
            ["M", "--output_dir", "out"],
        ),
        (["--model", "M", "-o", "out"], ["M", "-o", "out"]),
        (["--model", "M", "--output", "o"], ["M", "--output", "o"]),
        (
            ["--model", "M", "--bs", "4", "--seq_len", "64", "--formats", "auto_round",
             "--fp_layers", "a,b", "--device", "0"],
            ["M", *HOME, "--batch-size", "4", "--seqlen", "64",
             "--format", "auto_round", "--ignore-layers", "a,b", "--device-map", "0"],
        ),
        (
            ["--model", "M", '--layer_config={"a=b":{"bits":8}}'],
            ["M", *HOME, "--layer_config", '{"a=b":{"bits":8}}'],
        ),
    ],
)  # fmt: skip
def test_translation(given: list[str], own: list[str]) -> None:
    assert translate(given, None) == ["quantize", *own]


def test_flags_that_change_nothing_say_so() -> None:
    given = ["M", "--low_gpu_mem_usage", "--enable-torch-compile", "--bits", "3"]
    assert notes(given) == [
        "--low_gpu_mem_usage changes nothing: in every run a device holds one block and the batch "
        "at work, no more",
        "--enable-torch-compile changes nothing: in every run rounding and "
        "products are native kernels",
    ]
    assert translate(given, None) == ["quantize", "M", *HOME, "--bits", "3"]


def test_translation_names_the_recipe() -> None:
    assert translate(["M"], "light")[2:4] == ["--recipe", "light"]
    assert translate(["--model", "M", "--help"], "best") == ["quantize", "--help"]


@pytest.mark.parametrize("given", [[], ["--bits", "4"], ["--model"]])
def test_translation_without_a_model(given: list[str]) -> None:
    with pytest.raises(InputError, match="no model given; name it with --model"):
        translate(given, None)


@pytest.mark.parametrize("command", ["rtn", "default"])
def test_familiar_command(command: str, llama: Path, tmp_path: Path) -> None:
    code = f"from autoround.familiar import {command}; {command}()"
    options = ["--iters", "0"] if command == "default" else []
    done = subprocess.run(
        [sys.executable, "-c", code, f"--model={llama}", "--output_dir", str(tmp_path),
         "--group_size", "32", "--enable_torch_compile", *options],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: --enable_torch_compile changes nothing" in done.stderr
    assert (tmp_path / "llama-w4g32/config.json").is_file()


def test_familiar_error_is_one_line() -> None:
    code = "from autoround.familiar import best; best()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: no model given; name it with --model DIRECTORY"]
