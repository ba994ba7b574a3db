# SPDX-License-Identifier: Apache-2.0
"""Is this machine fit for a run: devices, kernels proven and timed, disk, memory, what is missing.

Proven means: every verb against the reference bit for bit, every kernel of products against f64,
those with 8-bit activations against f64 on the activations as they are then.
"""

import importlib.util
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import hal
from autoround.models.store import available_bytes
from autoround.run.record import free_bytes
from autoround.version import versions
from hal import device as devices
from hal.roofline import limits, share
from hal.testing import TOLERANCE, check, quantized, relative_error, weights

#: Packages of a run; those that are asked for here and nowhere else are in OPTIONAL.
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "accelerate")
#: Module -> what is not there without it, and the command that adds it.
OPTIONAL = {
    "hal._cpu": ("native CPU kernels", "pip install --no-binary autoround autoround  # needs g++"),
    "datasets": ("calibration text from the hub", "pip install 'autoround[data]'"),
    "pyarrow": ("calibration text in parquet files", "pip install 'autoround[data]'"),
    "triton": ("kernels for GPUs", "pip install 'autoround[triton]'"),
}
BITS = range(2, 9)
ROWS = (1, 8, 64, 600)
SHAPE = (96, 512)
#: What is timed: one row and many of the commonest scheme, on a layer of a 7B model.
TIMED, TIMED_SHAPE, TIMED_ROWS = "s4:g128:f16", (4096, 4096), (1, 16, 256, 1024)
DISK_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Proof:
    """One family on one device: how many answers were compared and which were wrong."""

    device: str
    family: str
    checks: int
    worst: float
    wrong: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Timed:
    """A product's share of the roofline on this machine, as it is loaded now."""

    device: str
    kernel: str
    m: int
    milliseconds: float
    of_roofline: float
    bound: str


@dataclass(slots=True)
class Diagnosis:
    """All that was found. ``missing``: part -> what is not there without it, and the command."""

    versions: dict[str, str]
    devices: list[dict[str, Any]] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    timed: list[Timed] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    disk: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether nothing that was proven is wrong."""
        return not any(proof.wrong for proof in self.proofs)

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``sound`` says whether everything proven is right."""
        return {"sound": self.sound} | asdict(self)


def examine(where: Path) -> Diagnosis:
    """Look at this machine and at the disk of a directory, in a few seconds."""
    found = Diagnosis(versions(PACKAGES))
    for device in hal.devices():
        caps, kind = device.caps, str(device.torch)
        best = limits(device.torch)
        facts = {
            "device": kind,
            "name": caps.name,
            "arch": caps.arch,
            "features": sorted(caps.features),
            "units": caps.units,
            "threads": torch.get_num_threads(),
            "memory": caps.memory,
            "served_by": list(device.served_by),
            "read_bytes_s": best and best[0],
            "peak_ops_s": best and best[1],
        }
        found.devices.append(facts)
        found.proofs += [*_verbs(device.torch), *_products(device.torch)]
        found.timed += _timed(device.torch)
    for kind, reason in devices.unavailable():
        found.devices.append({"device": kind, "unavailable": reason})
    found.memory = {"free": available_bytes(), "total": devices.devices()[-1].caps.memory}
    found.disk = _disk(where)
    found.missing = {n: v for n, v in OPTIONAL.items() if importlib.util.find_spec(n) is None}
    return found


def _verbs(device: torch.device) -> Iterator[Proof]:
    """Every verb, bit for bit."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for what, right in check(device):
        family, _, spec = what.partition(" ")
        found.setdefault(family, []).append((spec, right))
    for family, results in found.items():
        wrong = tuple(spec for spec, right in results if not right)
        yield Proof(str(device), family, len(results), 0.0, wrong)


def _products(device: torch.device) -> Iterator[Proof]:
    """Every kernel that multiplies, over all widths of codes and few and many rows."""
    errors: dict[str, list[tuple[str, float]]] = {}
    for bits in BITS:
        for spec in (hal.Spec(f"s{bits}"), hal.Spec(f"u{bits}", zero="int")):
            q = quantized(weights(*SHAPE, bits).to(device), spec)
            for act in (None, hal.Act("s8", spec.group)):
                for kernel, error in _against(q, act, device):
                    errors.setdefault(kernel, []).append((str(spec), error))
    for kernel, results in errors.items():
        most = TOLERANCE[torch.bfloat16]
        wrong = tuple(dict.fromkeys(spec for spec, error in results if not error < most))
        yield Proof(str(device), kernel, len(results), max(e for _, e in results), wrong)


def _against(
    q: hal.QTensor, act: hal.Act | None, device: torch.device
) -> Iterator[tuple[str, float]]:
    """(kernel, relative error) of products with one weight."""
    ready = hal.prepare(q, dtype=torch.bfloat16, act=act)
    dense = hal.dequantize(q, dtype=torch.float32).double()
    for m in ROWS:
        x = weights(m, SHAPE[1], m).bfloat16().to(device)
        name = ready.kernel(m).name
        seen = _seen(x, act) if act and name.endswith("_fast") else x.double()
        yield name, relative_error(hal.qgemm(x, ready), seen @ dense.T)


def _seen(x: torch.Tensor, act: hal.Act) -> torch.Tensor:
    """Activations ``[M, K]`` as a product in 8 bits sees them, f64."""
    codes, scale = hal.quantize_act(x, act)
    return codes.double() * scale.double().repeat_interleave(x.shape[1] // scale.shape[1], 1)


def _timed(device: torch.device) -> Iterator[Timed]:
    spec = hal.Spec.parse(TIMED)
    for m in TIMED_ROWS:
        if found := share(spec, m, TIMED_SHAPE, device):
            best = max(found.read, found.peak)
            bound = "memory" if found.read > found.peak else "arithmetic"
            ms = found.seconds * 1e3
            yield Timed(str(device), found.kernel, m, ms, best, bound)


def _disk(where: Path) -> dict[str, Any]:
    """Bytes a second written and synced, then read past the system's cache; free bytes."""
    facts: dict[str, Any] = {"directory": str(where.absolute()), "free": free_bytes(where)}
    path = where / f".autoround-doctor-{os.getpid()}"
    size = min(DISK_BYTES, facts["free"] // 4)
    block = os.urandom(1 << 20)
    try:
        started = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(size >> 20):
                file.write(block)
            os.fsync(file.fileno())
            facts["write_bytes_s"] = size / (time.perf_counter() - started)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        facts["read_bytes_s"] = size / (time.perf_counter() - started)
    except OSError as error:
        facts["problem"] = str(error)
    finally:
        path.unlink(missing_ok=True)
    return facts
