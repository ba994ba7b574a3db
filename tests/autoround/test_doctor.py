# SPDX-License-Identifier: Apache-2.0
"""`autoround doctor`: a sound machine is called so, a kernel that answers wrongly is named."""

import json
from pathlib import Path

import pytest
import torch

import hal
from autoround import cli, doctor
from hal.roofline import Share, limits, probes, share


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        cli.run(["doctor", *arguments])
    return int(end.value.code or 0), capsys.readouterr().out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, little is written."""
    monkeypatch.setattr(doctor, "limits", lambda device: (1e10, 1e12))
    monkeypatch.setattr(doctor, "share", lambda *_: Share("cpu.qgemm", 1e-3, 0.5, 0.25))
    monkeypatch.setattr(doctor, "DISK_BYTES", 1 << 20)


@pytest.mark.usefixtures("quick")
def test_a_sound_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = told(capsys, "--json", "--directory", str(tmp_path))
    found = json.loads(out)
    assert code == 0
    assert found["sound"]
    assert {d["device"] for d in found["devices"]} >= {str(d.torch) for d in hal.devices()}
    assert all(p["checks"] > 0 and not p["wrong"] for p in found["proofs"])
    assert {"tune", "store", "multiply"} < {p["family"] for p in found["proofs"]}
    assert found["versions"]["torch"] == torch.__version__
    assert 0 < found["memory"]["free"] <= found["memory"]["total"]
    assert found["disk"]["write_bytes_s"] > 0
    assert found["timed"][0]["of_roofline"] == 0.5
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = hal.qgemm

    def wrong(x: torch.Tensor, w: hal.Weight) -> torch.Tensor:
        y = right(x, w)
        return y + 0.05 * y.norm() / y.numel() ** 0.5 if w.spec.bits == 3 else y

    monkeypatch.setattr(hal, "qgemm", wrong)
    code, out = told(capsys)
    assert code == 1
    assert "WRONG: s3:g128:f16" in out
    assert "s4:g128" not in out.partition("of the roofline")[0]
    assert "HAL_BACKEND=reference" in out


def test_shares_of_the_roofline_are_shares() -> None:
    device = hal.devices()[-1].torch
    if probes(device) is None:
        pytest.skip("no native kernels here")
    best = limits(device, 0.05)
    assert best is not None
    assert min(best) > 1e8
    found = share(hal.Spec.parse("s4:g128:f16"), 1, (1024, 1024), device)
    assert found is not None
    assert 0 < max(found.read, found.peak) < 2
    assert found.kernel.startswith("cpu.")
