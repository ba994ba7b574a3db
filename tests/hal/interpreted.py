# SPDX-License-Identifier: Apache-2.0
"""How Triton's products are launched: no way changes a bit, and the measured way is the one taken.

Run by test_interpreter.py, in its process.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import hal
from hal import tuned
from hal.__main__ import main
from hal.backends import triton
from hal.registry import Case
from kernels_triton import products

CPU = torch.device("cpu")
SPECS = ("s4:g128:f16", "u3:g32:f16:int")
N, K = 40, 256
TAKEN = {"bn": 128, "warps": 8, "stages": 3}


@pytest.fixture(autouse=True)
def whole_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """With them a group's products are exact in whatever order NumPy, which is the interpreter's
    tensor core, takes them: the order that is seen is ours."""

    def whole(*shape: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float()

    monkeypatch.setattr(torch, "randn", whole)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned._read.cache_clear()
    return tmp_path


def case(text: str, m: int, experts: int = 1) -> Case:
    op = "qgemm" if experts == 1 else "qgemm_grouped"
    facts = triton.caps(CPU)
    return Case(op, hal.Spec.parse(text), torch.float32, N, K, facts, m, None, experts)


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize(("m", "experts"), [(1, 1), (8, 1), (64, 1), (16, 2)])
def test_no_launch_changes_a_bit(text: str, m: int, experts: int) -> None:
    of = case(text, m, experts)
    table, (run, out) = triton._table(of), triton._run(of, CPU)
    run(table)
    want = out.clone()
    assert float(want.abs().max()) > 0
    ways = products.candidates(table)
    assert table in ways
    for launch in {replace(way, warps=4, stages=3) for way in ways}:  # which here mean nothing
        run(launch)
        assert torch.equal(out, want), launch


def timed(quickest: dict[str, int]) -> Callable[[Callable[[], None]], float]:
    """A clock that likes one launch best: it looks into the call that it is given."""

    def milliseconds(call: Callable[[], None]) -> float:
        launch = (call.__defaults__ or (products.Config(0, 0, 0, 0, 0, 0),))[0]
        return 1.0 if quickest.items() <= asdict(launch).items() else 2.0

    return milliseconds


def test_what_was_measured_is_taken(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = case("s4:g128:f16", 64)
    assert "from the table" in triton._explain(of)
    monkeypatch.setattr(triton, "_milliseconds", timed(TAKEN))
    said = triton._tune(of, CPU)
    assert "measured, 1.0 ms to the table's 2.0" in said
    launch, found = triton._launch(of)
    assert launch == replace(triton._table(of), **TAKEN)
    assert found["ms"] == 1.0
    assert triton._launch(replace(of, m=16))[1] == {}  # another case
    assert triton._launch(replace(of, caps=replace(of.caps, name="other")))[1] == {}
    monkeypatch.setattr(triton, "_compiler", lambda: "triton 9")
    assert triton._launch(of)[1] == {}


def test_a_launch_with_other_bits_is_left(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product = products.product

    def wrong(x, planes, bias, out, launch):  # type: ignore[no-untyped-def]
        product(x, planes, bias, out, launch)
        if launch.bn == TAKEN["bn"]:
            out[0, 0] += 1

    monkeypatch.setattr(products, "product", wrong)
    monkeypatch.setattr(triton, "_milliseconds", timed(TAKEN))
    of = case("s4:g128:f16", 64)
    triton._tune(of, CPU)
    assert triton._launch(of)[0] == triton._table(of)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"KEY": 3}', '{"KEY": {"bn": 48, "warps": 4, "stages": 3}}',
     '{"KEY": {"bn": "64"}}', '{"KEY": {"bn": null, "warps": [], "stages": {}}}'],
)  # fmt: skip
def test_a_file_that_is_not_ours(text: str, own_cache: Path) -> None:
    of = case("s4:g128:f16", 64)
    path = tuned.file(of, triton._compiler())
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("KEY", tuned.key(of)))
    assert triton._launch(of) == (triton._table(of), {})
    tuned.keep(of, triton._compiler(), TAKEN)
    assert triton._launch(of)[0] == replace(triton._table(of), **TAKEN)
    assert json.loads(path.read_text())[tuned.key(of)] == TAKEN


def test_the_command(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HAL_BACKEND", "triton")
    monkeypatch.setattr(triton, "_milliseconds", timed(TAKEN))
    asked = ["--shapes", f"{N}x{K}", "--rows", "16", "--dtype", "f32"]
    assert main(["tune", *asked]) == 0
    assert "bn 128" in capsys.readouterr().out
    main(["explain", "s4:g128:f16", "--n", str(N), "--k", str(K), "--m", "9", "--dtype", "f32"])
    said = capsys.readouterr().out
    assert "triton.qgemm: bm 16, bn 128" in said
    assert "measured, 1.0 ms" in said
    monkeypatch.setenv("HAL_BACKEND", "reference")
    assert main(["tune", *asked]) == 1
