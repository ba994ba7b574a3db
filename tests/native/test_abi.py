# SPDX-License-Identifier: Apache-2.0
"""What the native objects show to the linker."""

import shutil
import subprocess
from pathlib import Path

import pytest

from hal.backends import cpu

CSRC = Path(__file__).parents[2] / "csrc"
#: What compilers may call on their own.
LIBC = {"memcpy", "memset", "memmove"}


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type letter, name) of every symbol ``nm`` lists."""
    out = subprocess.run(["nm", *options, path], capture_output=True, text=True, check=True).stdout
    return [(fields[-2], fields[-1]) for line in out.splitlines() if (fields := line.split())]


@pytest.mark.slow
def test_an_isa_object_shows_its_table_and_nothing_else(native_build: Path) -> None:
    """A weak symbol would be merged across instruction sets, and the wrong one might be kept."""
    objects = sorted(native_build.glob("CMakeFiles/hal_isa_*.dir/csrc/*.o"))
    assert objects
    for path in objects:
        isa = path.name.removeprefix("isa_").removesuffix(".cpp.o")
        seen = symbols(path)
        shown = {name for kind, name in seen if kind.isupper() and kind != "U"}
        assert shown == {f"hal_table_{isa}"}
        assert not [name for kind, name in seen if kind in "vVwWu"]
        assert {name for kind, name in seen if kind == "U"} <= LIBC


@pytest.mark.skipif(cpu.probe() is not None or not shutil.which("nm"), reason="needs hal._cpu, nm")
def test_the_module_exports_its_entry_point_only() -> None:
    exported = symbols(Path(str(cpu.native().__file__)), "-D", "--defined-only")
    assert [name for _, name in exported if name.startswith("PyInit")] == ["PyInit__cpu"]
    assert not [name for _, name in exported if "hal" in name.lower()]


def test_isa_sources_include_no_standard_library_templates() -> None:
    shared = [*CSRC.glob("*.h"), *CSRC.glob("*.inl"), *CSRC.glob("isa_*.cpp")]
    baseline = ("threads.h", "dispatch.h", "crc32.h", "bind_groups.h")
    allowed = {"<stdint.h>", "<immintrin.h>", "<arm_neon.h>"}
    for path in shared:
        if path.name in baseline:
            continue
        found = {
            line.split()[1]
            for line in path.read_text().splitlines()
            if line.startswith("#include <")
        }
        assert found <= allowed, path.name
