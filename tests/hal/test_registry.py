# SPDX-License-Identifier: Apache-2.0
"""Which row serves, why the others do not, and the switches that change it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hal
from hal import device
from hal.backends import backends, cpu, kernels
from hal.registry import BUCKETS, Case, Kernel, bucket, explain, select

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(cpu.probe() is not None, reason=str(cpu.probe()))


def case(op: str = "qgemm", spec: str = "s4:g128:f16", m: int = 1) -> Case:
    return Case(op, hal.Spec.parse(spec), torch.bfloat16, 256, 256, device.caps(CPU), m=m)


def test_bucket() -> None:
    assert [bucket(m) for m in (1, 3, 8, 9, 512, 10**6)] == [1, 4, 8, 16, 512, 1024]
    assert bucket(BUCKETS[-1] + 1) == BUCKETS[-1]


def test_position_is_priority() -> None:
    for op in {row.op for row in kernels("cpu")}:
        answers = explain(case(op))
        able = [row for row, reason in answers if reason is None]
        assert select(case(op)) is able[0]
        assert answers[-1][0].name.startswith("reference.")


def test_names_say_backend_and_op() -> None:
    for backend in backends():
        for row in backend.KERNELS:
            assert row.name.startswith(f"{backend.NAME}.{row.op}")


def test_hal_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_BACKEND", "reference")
    assert select(case()).name == "reference.qgemm"
    reasons = {row.name: reason for row, reason in explain(case())}
    assert all(r == "HAL_BACKEND=reference" for n, r in reasons.items() if n.startswith("cpu."))


@needs_native
def test_hal_kernel_restricts_and_keeps_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_KERNEL", "*_rounded")
    assert select(case(m=1)).name == "reference.qgemm"
    monkeypatch.setenv("HAL_KERNEL", "cpu.qgemm")
    assert select(case(m=512)).name == "cpu.qgemm"


@needs_native
def test_hal_isa_must_exist_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_ISA", "scalar")
    assert cpu.isas()[cpu.isa()] == "scalar"
    monkeypatch.setenv("HAL_ISA", "sve2")
    with pytest.raises(ValueError, match=r"HAL_ISA=sve2: this machine has .*scalar"):
        cpu.isa()


def test_unsupported_carries_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_BACKEND", "nobody")
    with pytest.raises(hal.Unsupported, match=r"reference\.qgemm: HAL_BACKEND=nobody"):
        select(case())


def test_a_plan_reads_one_layout() -> None:
    q = hal.quantize(*_weight())
    w = hal.prepare(q, dtype=torch.bfloat16)
    assert {row.layout for _, row in w.kernels} == {w.layout}
    assert w.kernel(1) is w.kernels[0][1]
    assert w.kernel(10**6) is w.kernels[-1][1]


def _weight() -> tuple[torch.Tensor, hal.Params, hal.Spec]:
    w, spec = torch.randn(64, 256), hal.Spec("s4")
    return w, hal.search(w, spec), spec


def test_a_row_can_refuse() -> None:
    row = Kernel("test.qgemm", "qgemm", print, lambda c: "odd" if c.n % 2 else None)
    assert row.when(case()) is None


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    command = [sys.executable, "-m", "hal", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def test_command_line() -> None:
    status = run()
    assert status.returncode == 0, status.stderr
    assert "PASS" in status.stdout
    assert "qgemm_grouped" in status.stdout
    explained = run("explain", "s4:g128:f16", "--m", "1", HAL_BACKEND="reference")
    assert re.search(r"^reference\.qgemm +serves", explained.stdout, re.M)
    fast = run("explain", "s4:g128:f16", "--m", "1", "--fast", HAL_ISA="scalar")
    assert "no integer dot products" in fast.stdout or cpu.probe()


@needs_native
def test_the_matrix_of_the_readme_is_the_one_that_is_printed() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    held = text.partition("<!-- matrix -->\n")[2].partition("<!-- /matrix -->")[0]
    assert held == run("matrix", HAL_ISA="", HAL_BACKEND="").stdout
