# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: the CUDA backend on CPU tensors, its kernels played by tests/native/simt.h.

``SIMT_MODULE`` names the extension module that `build` made. In a process of its own, since it
changes what the HAL holds true.
"""

import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

from hal.backends import cuda
from hal.registry import EMULATED

ROOT = Path(__file__).parents[2]


def build(folder: Path, root: Path = ROOT) -> Path:
    """hal._cuda of the sources below ``root``, with launches that run on this machine."""
    here, kernels = root / "tests" / "native", root / "kernels_cuda"
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"]
    flags += ["-Wno-clobbered"]  # of getcontext, which returns twice
    found = [here, pybind11.get_include(), sysconfig.get_paths()["include"]]
    sources = [kernels / "bind.cpp", here / "simt_groups.cpp", here / "simt_product.cpp"]
    include = [f"-I{path}" for path in found]
    subprocess.run(["g++", *flags, *include, *sources, "-o", module], check=True)
    return module


def load(path: Path) -> ModuleType:
    """The module that `build` made."""
    loader = importlib.machinery.ExtensionFileLoader("hal._cuda", str(path))
    spec = importlib.util.spec_from_loader("hal._cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def serve(module: ModuleType) -> None:
    """Let the backend take CPUs for its GPUs."""
    cuda._import = lambda: module  # type: ignore[assignment]
    cuda._stream = lambda device: 0  # type: ignore[assignment]
    cuda.KINDS["cpu"] = EMULATED


if "SIMT_MODULE" in os.environ:
    serve(load(Path(os.environ["SIMT_MODULE"])))
