# SPDX-License-Identifier: Apache-2.0
"""The native objects, built by CMake with warnings as errors: for this machine and for others."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def built(build: Path, *targets: str, **defines: str) -> Path:
    """Configure and build ``targets`` (none = all) in ``build``."""
    import pybind11

    defines |= {"HAL_STRICT": "ON", "pybind11_DIR": pybind11.get_cmake_dir()}
    defines["Python_EXECUTABLE"] = sys.executable
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja"]
    subprocess.run([*configure, *(f"-D{k}={v}" for k, v in defines.items())], check=True)
    subprocess.run(["ninja", "-C", build, *targets], check=True)
    return build
