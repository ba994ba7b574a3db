# SPDX-License-Identifier: Apache-2.0
"""Machines that we do not have, emulated: what they select, and that it gives the same bits.

Needs Debian's qemu-user and, for Arm, g++-aarch64-linux-gnu; without them the tests are skipped.
"""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from objects import built

from hal.backends import cpu
from hal.testing import TOLERANCE

pytestmark = pytest.mark.slow

#: bf16 is the coarsest output; fast products add the rounding of activations (README: 0.7 %).
LIMITS = {"gemm": max(TOLERANCE.values()), "fast": 0.025}


def emulator(name: str) -> str:
    """qemu for an architecture, or skip."""
    found = shutil.which(f"qemu-{name}") or shutil.which(f"qemu-{name}-static")
    if not found:
        pytest.skip(f"needs qemu-{name} (Debian: apt-get install qemu-user)")
    return found


@cache
def lines(*command: str) -> dict[str, dict[tuple[str, str], str]]:
    """table -> (verb, case) -> what ``tables`` printed, for the tables it found, best first."""
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, dict[tuple[str, str], str]] = {}
    for line in run.stdout.splitlines():
        fields = line.split()
        if fields[0] == "table":
            found[fields[1]] = {}
        else:
            found[fields[0]][fields[1], fields[2]] = fields[3]
    return found


def agree(got: dict[tuple[str, str], str], want: dict[tuple[str, str], str]) -> None:
    """Equal bits, and products within their limits."""
    assert got.keys() == want.keys()
    for (verb, case), value in got.items():
        limit = LIMITS.get(verb.split("-")[0])
        if limit is not None:
            assert float(value) < limit, (verb, case, value)
        else:
            assert value == want[verb, case], (verb, case)


def test_every_table_of_this_machine(native_build: Path) -> None:
    found = lines(str(native_build / "tables"))
    assert list(found) == list(cpu.isas())
    for table in found.values():
        agree(table, found["scalar"])


def test_a_machine_without_avx512(native_build: Path) -> None:
    """qemu knows no AVX-512: one such instruction on the way would end the process."""
    haswell = [emulator("x86_64"), "-cpu", "Haswell"]
    found = lines(*haswell, str(native_build / "tables"))
    assert list(found) == ["avx2", "scalar"]
    for name, table in found.items():
        agree(table, lines(str(native_build / "tables"))[name])
    module = next(native_build.glob("_cpu*.so"))
    ask = (
        "from importlib.machinery import ExtensionFileLoader as Loader;"
        f"print(*Loader('_cpu', {str(module)!r}).load_module('_cpu').isas())"
    )
    run = subprocess.run(
        [*haswell, sys.executable, "-W", "ignore", "-c", ask], capture_output=True, text=True
    )
    assert run.stdout.split() == ["avx2", "scalar"], run.stderr


def test_a_machine_without_avx2(native_build: Path) -> None:
    found = lines(emulator("x86_64"), "-cpu", "Nehalem", str(native_build / "tables"))
    assert list(found) == ["scalar"]
    agree(found["scalar"], lines(str(native_build / "tables"))["scalar"])


@pytest.fixture(scope="module")
def arm_tables(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = "aarch64-linux-gnu-g++"
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler} (Debian: apt-get install g++-aarch64-linux-gnu)")
    target = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64"}
    build = tmp_path_factory.mktemp("aarch64")
    return str(built(build, "tables", CMAKE_CXX_COMPILER=compiler, **target) / "tables")


@pytest.mark.parametrize(
    ("processor", "tables"),
    [
        ("cortex-a53", ["neon"]),
        ("cortex-a76", ["neon_dot", "neon"]),
        ("max", ["neon_i8mm", "neon_dot", "neon"]),
    ],
)
def test_arm(native_build: Path, arm_tables: str, processor: str, tables: list[str]) -> None:
    found = lines(emulator("aarch64"), "-cpu", processor, arm_tables)
    assert list(found) == tables
    for table in found.values():
        agree(table, lines(str(native_build / "tables"))["scalar"])
