# SPDX-License-Identifier: Apache-2.0
"""What the native objects show to the linker, and that they build where we cannot run them."""

import shutil
import subprocess
import sys
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


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The objects of every instruction set of this machine's architecture, built strictly."""
    if not all(shutil.which(tool) for tool in ("cmake", "ninja", "g++", "nm")):
        pytest.skip("needs cmake, ninja, g++ and nm")
    pybind11 = pytest.importorskip("pybind11")
    build = tmp_path_factory.mktemp("build")
    configure = ["cmake", "-S", CSRC.parent, "-B", build, "-G", "Ninja", "-DHAL_STRICT=ON"]
    config = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run([*configure, *config], check=True, capture_output=True)
    subprocess.run(["ninja", "-C", build, "-j2"], check=True, capture_output=True)
    return sorted(build.glob("CMakeFiles/hal_isa_*.dir/csrc/*.o"))


@pytest.mark.slow
def test_an_isa_object_shows_its_table_and_nothing_else(objects: list[Path]) -> None:
    """A weak symbol would be merged across instruction sets, and the wrong one might be kept."""
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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="needs g++-aarch64-linux-gnu")
def test_the_neon_table_compiles(tmp_path: Path) -> None:
    built = tmp_path / "neon.o"
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    compiler = ["aarch64-linux-gnu-g++", *flags, "-Wno-psabi", "-c"]
    subprocess.run([*compiler, CSRC / "isa_neon.cpp", "-o", built], check=True)
    subprocess.run([*compiler, CSRC / "dispatch.cpp", "-o", tmp_path / "d.o"], check=True)
    assert ("D", "hal_table_neon") in symbols(built)


def test_isa_sources_include_no_standard_library_templates() -> None:
    shared = [*CSRC.glob("*.h"), *CSRC.glob("*.inl"), *CSRC.glob("isa_*.cpp")]
    allowed = {"<stdint.h>", "<immintrin.h>"}
    for path in shared:
        if path.name in ("threads.h", "dispatch.h"):  # of the baseline objects
            continue
        found = {
            line.split()[1]
            for line in path.read_text().splitlines()
            if line.startswith("#include <")
        }
        assert found <= allowed, path.name
