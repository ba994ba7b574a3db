# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: two devices called ``standin``, accelerators as far as torch can tell.

``STANDIN`` names the library that `build` made of standin.cpp. In a process of its own: torch has
the devices for good, and takes them for this machine's first.
"""

import os
import subprocess
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

NAME = "standin"


def build(folder: Path) -> Path:
    library = folder / "libstandin.so"
    include = [f"-I{path}" for path in include_paths()]
    own = Path(torch.__file__).parent / "lib"
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", *include]
    source = Path(__file__).with_suffix(".cpp")
    subprocess.run(
        [*command, source, f"-L{own}", "-ltorch_cpu", "-lc10", "-o", library], check=True
    )
    return library


def serve(library: Path) -> None:
    """Make torch know the devices."""
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True  # type: ignore[attr-defined]
    module.device_count = lambda: 2  # type: ignore[attr-defined]
    module.current_device = torch.accelerator.current_device_index  # type: ignore[attr-defined]
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()


if "STANDIN" in os.environ:
    serve(Path(os.environ["STANDIN"]))
