# SPDX-License-Identifier: Apache-2.0
"""`autoround report`: well-formed, true to the files and to `evaluate`, on every directory."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import hostile
import pytest
import torch
import yaml
import zoo
from safetensors.torch import load_file

import autoround
from autoround import cli
from autoround.errors import InputError
from autoround.evaluate import Pair, evaluate
from autoround.report import Choices, Report, report

SVG = "{http://www.w3.org/2000/svg}"
SMALL = Choices(nsamples=3, seqlen=40)
WIDE = {"vocab_size": 320, "num_hidden_layers": 2}
FORMATS = "auto_round,llm_compressor,mlx,fake"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    zoo.save("qwen3", path, "5GB", WIDE, torch.bfloat16)
    hostile.add_tokenizer(path)
    card = "---\nlicense: apache-2.0\npipeline_tag: text-generation\nlanguage: [en]\n---\n# Tiny\n"
    (path / "README.md").write_text(card)
    return path


def quantized(source: Path, output: Path, *arguments: str) -> Path:
    with pytest.raises(SystemExit) as end:
        cli.run(
            ["quantize", str(source), "-o", str(output), "--group-size", "32", "-q", *arguments]
        )
    assert not end.value.code
    return output


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned run in several formats; two layers are other than the rest."""
    return quantized(
        source, tmp_path_factory.mktemp("runs") / "run", "--format", FORMATS, "--nsamples", "8",
        "--seqlen", "32", "--layer-config", "{layers.1.mlp.up_proj:{bits:8},k_proj:{bits:16}}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def reported(made: Path, source: Path) -> tuple[Report, dict[str, Any]]:
    choices = Choices(str(source), None, SMALL.nsamples, SMALL.seqlen)
    found, files = report(str(made), None, choices)
    assert [file.name for file in files] == ["report.html", "report.json", "README.md"]

    def never(name: str) -> None:
        raise AssertionError(f"{name} in report.json")

    return found, json.loads((made / "report.json").read_text(), parse_constant=never)


# ---- what it says ------------------------------------------------------------------------------


def test_quality_is_what_evaluate_finds(
    reported: tuple[Report, dict[str, Any]], made: Path, source: Path
) -> None:
    _, data = reported
    alone = evaluate(str(made / "auto_round"), str(source), nsamples=SMALL.nsamples,
                     seqlen=SMALL.seqlen, speed=False, noise=True)  # fmt: skip
    assert data["evaluation"] == json.loads(json.dumps(alone.to_json()))
    c, n = data["evaluation"]["comparison"], data["evaluation"]["noise"]["comparison"]
    assert 0 < n["kl"] < c["kl"]
    curves = data["curves"]
    assert len(curves["percentiles"]) == len(curves["noise_percentiles"]) == 101
    assert curves["percentiles"] == sorted(curves["percentiles"])
    assert curves["percentiles"][50] == pytest.approx(c["kl_median"], rel=0.1)
    assert curves["ends"][-1] == SMALL.seqlen - 1
    widths = [b - a for a, b in zip([0, *curves["ends"]], curves["ends"], strict=False)]
    mean = sum(w * x for w, x in zip(widths, curves["along"], strict=True)) / sum(widths)
    assert mean == pytest.approx(c["kl"])


def test_layers_against_plain_arithmetic(
    reported: tuple[Report, dict[str, Any]], made: Path, source: Path
) -> None:
    """Errors from the dequantized files in float64; outputs from inputs caught by a hook."""
    _, data = reported
    weights, dense = (
        load_file(source / "model.safetensors"),
        load_file(made / "fake/model.safetensors"),
    )
    layers = {layer["name"]: layer for layer in data["layers"]}
    for name, layer in layers.items():
        if layer["weight_error"] is None:
            assert torch.equal(dense[f"{name}.weight"], weights[f"{name}.weight"])
            continue
        w, q = weights[f"{name}.weight"].double(), dense[f"{name}.weight"].double()
        want = float((w - q).norm() / w.norm())
        assert layer["weight_error"] == pytest.approx(want, rel=0.02), name  # fake is bf16
    kinds = {name.rpartition(".")[2]: layer["bits"] for name, layer in layers.items()}
    assert kinds["q_proj"] == 4.5
    assert kinds["k_proj"] == 16
    assert layers["model.layers.1.mlp.up_proj"]["bits"] == 8.5
    assert layers["model.layers.0.mlp.up_proj"]["bits"] == 4.5

    name = "model.layers.1.mlp.down_proj"
    model = autoround.load(source)
    caught: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, x: caught.append(x[0]))
    pair = Pair(str(made / "auto_round"), str(source), None, "exact")
    with torch.no_grad():
        model(pair.text(None, SMALL.nsamples, SMALL.seqlen).ids[:1])
    x, w, q = (
        t.double() for t in (caught[0][0], weights[f"{name}.weight"], dense[f"{name}.weight"])
    )
    want = float((x @ (w - q).t()).norm() / (x @ w.t()).norm())
    assert layers[name]["output_error"] == pytest.approx(want, rel=0.03)
    tuned = [layer for layer in layers.values() if layer["output_error"] is not None]
    better = [x for x in tuned if x["output_error"] < x["output_error_rtn"]]
    assert len(tuned) == 12
    assert len(better) >= 8


def test_what_the_run_wrote_down(reported: tuple[Report, dict[str, Any]], made: Path) -> None:
    _, data = reported
    record = json.loads((made / "auto_round/autoround.json").read_text())
    assert data["recipe"] == record["recipe"]
    assert data["calibration"] == record["calibration"]
    assert [(b["loss_rtn"], b["loss"]) for b in data["blocks"]] == [
        (b["loss_rtn"], b["loss"]) for b in record["blocks"]
    ]
    assert sum(data["fates"].values()) == len(record["tensors"])
    assert {d["format"] for d in data["directories"]} == {*FORMATS.split(",")}
    assert all(d["verified"] for d in data["directories"])
    assert sum(k["count"] for k in data["kernels"]) == 12
    assert all(k["one"].count(".") >= 1 for k in data["kernels"])


# ---- how it looks ------------------------------------------------------------------------------


def test_page_is_well_formed_and_self_contained(
    reported: tuple[Report, dict[str, Any]], made: Path
) -> None:
    text = (made / "report.html").read_text()
    tree = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    plots = tree.findall(f".//{SVG}svg")
    assert len(plots) >= 5
    for plot in plots:
        _, _, width, height = map(float, plot.attrib["viewBox"].split())
        for place in plot.iter(f"{SVG}text"):
            assert 0 <= float(place.attrib["x"]) <= width
            assert 0 <= float(place.attrib["y"]) <= height
    assert not {node.tag for node in tree.iter()} & {"script", "link", "img", "iframe"}
    assert text.replace("http://www.w3.org/2000/svg", "").count("http") == 0
    assert "url(" not in text
    shown = re.sub("<style>.*?</style>", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf|none)\b", shown, re.IGNORECASE)
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text
    found, _ = reported
    assert found.evaluation.comparison is not None
    assert f"{found.evaluation.comparison.perplexity:.3f}" in text


def test_card(reported: tuple[Report, dict[str, Any]], made: Path) -> None:
    text = (made / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "text-generation"
    assert front["tags"] == ["autoround", "quantized", "4-bit"]
    assert "base_model" not in front  # a local directory is no name on the hub
    found, _ = reported
    c = found.evaluation.comparison
    assert c is not None
    assert f"| perplexity | {c.perplexity:.4f} |" in body
    assert "VERIFIED auto_round" in body


def test_base_model_of_a_hub_snapshot(source: Path, made: Path, tmp_path: Path) -> None:
    cached = tmp_path / "hub/models--Org--Tiny-1B/snapshots/abc"
    shutil.copytree(source, cached)
    (cached / "README.md").write_text(
        '---\nlicense: "a: b\\"c"\nlicense_link: !!python/x [1\n---\n'
    )
    choices = Choices(str(cached), None, SMALL.nsamples, SMALL.seqlen)
    report(str(made / "auto_round"), tmp_path / "out", choices)
    front = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---\n", 2)[1])
    assert front["base_model"] == "Org/Tiny-1B"
    assert front["base_model_relation"] == "quantized"
    assert "a: b" in front["license"]


# ---- every kind of directory -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto_round", "llm_compressor", "mlx", "fake", "foreign"])
def test_every_directory(kind: str, made: Path, source: Path, tmp_path: Path) -> None:
    """Files of each format, and those of another program, which have no record."""
    shutil.copytree(made / ("auto_round" if kind == "foreign" else kind), tmp_path / kind)
    if kind == "foreign":
        (tmp_path / kind / "autoround.json").unlink()
    choices = Choices(str(source), None, SMALL.nsamples, SMALL.seqlen)
    found, (page, _, _) = report(str(tmp_path / kind), None, choices)
    assert found.evaluation.comparison is not None
    assert found.evaluation.comparison.kl > 0
    assert len([x for x in found.layers if x.weight_error]) == (0 if kind == "fake" else 12)
    assert bool(found.blocks) == (kind != "foreign")
    ElementTree.fromstring(page.read_text().removeprefix("<!DOCTYPE html>"))


def test_rounded_run_without_data(source: Path, tmp_path: Path) -> None:
    run = quantized(source, tmp_path / "rtn", "--iters", "0")
    choices = Choices(str(source), None, SMALL.nsamples, SMALL.seqlen)
    found, _ = report(str(run), None, choices)
    assert [d.name for d in found.directories] == ["."]
    assert all(b.loss is None for b in found.blocks)
    same = [x for x in found.layers if x.output_error is not None]
    assert same
    assert all(x.output_error == x.output_error_rtn for x in same)
    found, _ = report(str(run), None, choices)  # over its own files


# ---- the log -----------------------------------------------------------------------------------

LOG = """{"event": "started", "command": "autoround quantize M --iters 3", "model": "%s"}
{"event": "block_done", "name": "model.layers.0", "seconds": 1.5, "peak_bytes": 1000000}
{"event": "block_done", "name": "model.layers.0", "seconds": 2.5, "peak_bytes": 2000000}
{"event": "block_done", "name": "model.layers.1", "seconds": NaN, "peak_bytes": "x"}
[[[[ broken
{"event": "finished", "seconds": 12.25}
"""


def test_times_and_source_come_from_the_log(made: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    (tmp_path / "run/autoround.log").write_text(LOG % source)
    found, _ = report(str(tmp_path / "run"), tmp_path / "out", SMALL)
    assert found.command == "autoround quantize M --iters 3"
    assert found.seconds == 12.25
    assert [b.seconds for b in found.blocks] == [2.5, None]
    assert [b.peak_bytes for b in found.blocks] == [2_000_000, None]
    assert found.evaluation.against == str(source)


# ---- refusals ----------------------------------------------------------------------------------


def _no_log(run: Path) -> str:
    (run / "autoround.log").unlink(missing_ok=True)
    return "name the float model with --against"


def _gone(run: Path) -> str:
    (run / "autoround.log").write_text(LOG % (run / "gone"))
    return "is gone; name it with --against"


def _others(run: Path) -> str:
    (run / "README.md").write_text("# my own words\n")
    return "README.md is not ours and would be overwritten"


def _empty(run: Path) -> str:
    shutil.rmtree(run)
    run.mkdir()
    return "has no config.json; give the directory of a finished run"


@pytest.mark.parametrize("damage", [_no_log, _gone, _others, _empty])
def test_refusals(damage: Callable[[Path], str], made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    for name in ("README.md", "report.html", "report.json"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    words = damage(tmp_path / "run")
    with pytest.raises(InputError) as refused:
        report(str(tmp_path / "run"), None, SMALL)
    assert words in str(refused.value)
    assert not (tmp_path / "run/report.html").exists()


def test_a_record_that_is_damaged(made: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "auto_round", tmp_path / "run")
    record = json.loads((tmp_path / "run/autoround.json").read_text())
    record["blocks"] = [{"name": 3, "loss": "x"}]
    (tmp_path / "run/autoround.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"autoround.json does not describe its blocks"):
        report(str(tmp_path / "run"), None, Choices(str(source), None, 2, 16))
