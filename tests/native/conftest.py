# SPDX-License-Identifier: Apache-2.0
"""The native build of this machine, once."""

import shutil
from pathlib import Path

import pytest
from objects import built


@pytest.fixture(scope="session")
def native_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module, its objects and ``tables`` for this machine."""
    missing = [tool for tool in ("cmake", "ninja", "g++", "nm") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    pytest.importorskip("pybind11")
    return built(tmp_path_factory.mktemp("build"), "all", "tables")
