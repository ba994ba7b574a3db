# SPDX-License-Identifier: Apache-2.0
"""The rules of dependency, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEVICES = {"cpu", "cuda", "xpu", "hpu", "mps"}
MODULES = {"cuda", "xpu", "hpu", "mps"}
SIBLINGS = ("stages", "formats", "models", "calib")
NATIVE = {"hal._cpu", "hal._cuda", "hal._sycl", "kernels_triton"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[str]:
    """Every module named by an import, ``from a import b`` as both ``a`` and ``a.b``."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_backend(path: Path) -> bool:
    return where(path).startswith("hal/backends/")


def test_hal_depends_on_torch_only() -> None:
    allowed = {"torch", "hal", *sys.stdlib_module_names}
    for path in sources("hal"):
        found = {name.split(".")[0] for name in imports(path)}
        extra = (
            found - allowed - ({"triton", "kernels_triton", "mlx"} if is_backend(path) else set())
        )
        assert not extra, where(path)


def test_kernels_depend_on_torch_and_triton_only() -> None:
    for path in sources("kernels_triton"):
        found = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert found <= {"torch", "triton", "kernels_triton"}, where(path)


def test_native_modules_are_imported_by_backends_only() -> None:
    for path in [*sources("hal"), *sources("autoround")]:
        if not is_backend(path):
            assert not NATIVE & set(imports(path)), where(path)


@pytest.mark.parametrize("package", ["hal", "autoround"])
def test_devices_are_named_in_their_place_only(package: str) -> None:
    for path in sources(package):
        if is_backend(path) or where(path) == "hal/device.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare):
                named = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not named & DEVICES, f"{where(path)}:{node.lineno} compares a device name"
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "torch"
            ):
                assert node.attr not in MODULES, f"{where(path)}:{node.lineno} torch.{node.attr}"


@pytest.mark.parametrize("package", ["hal", "autoround"])
def test_public_functions_name_their_arguments(package: str) -> None:
    for path in sources(package):
        if "integrations" in path.parts:  # overrides methods whose signatures are another project's
            continue
        for node in ast.walk(tree(path)):
            named = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if named and node.name != "forward":  # modules stand in for modules we did not write
                assert node.args.kwarg is None, f"{where(path)}:{node.lineno} {node.name}(**)"


def test_siblings_do_not_know_each_other() -> None:
    for own in SIBLINGS:
        others = tuple(f"autoround.{name}" for name in SIBLINGS if name != own)
        for path in sources(f"autoround/{own}"):
            assert not [name for name in imports(path) if name.startswith(others)], where(path)


def test_decoders_share_nothing_with_the_packers() -> None:
    """What proves the files must not be what wrote them."""
    for path in (ROOT / "autoround/verify/decode.py", ROOT / "autoround/verify/claims.py"):
        found = {name for name in imports(path) if not name.startswith("autoround.patterns")}
        named = {name.split(".")[0] for name in found}
        assert named <= {"torch", *sys.stdlib_module_names}, where(path)


@pytest.mark.parametrize("package", ["hal", "autoround"])
def test_importing_is_quiet(package: str) -> None:
    """No thread, no device, no transformers, no native module."""
    code = f"""
import sys, threading, torch
def threads():
    return len([*__import__("os").scandir("/proc/self/task")]) if sys.platform == "linux" else 0
before = threads(), threading.active_count()
import {package}
assert (threads(), threading.active_count()) == before, "threads"
assert "transformers" not in sys.modules, "transformers"
assert not [name for name in sys.modules if name.startswith("hal._")], "native module"
assert not torch.cuda.is_initialized(), "device"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
