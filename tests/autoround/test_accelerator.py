# SPDX-License-Identifier: Apache-2.0
"""Runs on an accelerator, without one: see tests/standin."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STANDIN = HERE.parent / "standin"
sys.path.insert(0, str(STANDIN))
import standin  # noqa: E402


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize(
    ("which", "least"), [("not slow", 17), pytest.param("slow", 2, marks=pytest.mark.slow)]
)
def test_runs_on_an_accelerator(which: str, least: int, tmp_path: Path) -> None:
    library = standin.build(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "standin"]
    paths = os.pathsep.join(map(str, (STANDIN, HERE)))
    done = subprocess.run(
        [*command, "-m", which, str(STANDIN / "on_standin.py")],
        env={**os.environ, "STANDIN": str(library), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= least
