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

HERE, KERNELS = Path(__file__).parent, Path(__file__).parents[2] / "kernels_cuda"


def build(folder: Path) -> Path:
    """hal._cuda with its own binding and bodies, and launches that run on this machine."""
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"]
    flags += ["-Wno-clobbered"]  # of getcontext, which returns twice
    found = [HERE, pybind11.get_include(), sysconfig.get_paths()["include"]]
    sources = [KERNELS / "bind.cpp", HERE / "simt_groups.cpp", HERE / "simt_product.cpp"]
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
