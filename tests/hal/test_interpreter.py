# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against the reference under Triton's interpreter, in a process of its own: what
is interpreted is settled when triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PARITY, LAUNCHES = map(Path(__file__).with_name, ("test_parity.py", "interpreted.py"))


@pytest.mark.parametrize(
    ("which", "least"),
    [((PARITY, "-k", "triton"), 40), ((LAUNCHES,), 18)],
    ids=["parity", "launches"],
)
def test_under_the_interpreter(which: tuple[str | Path, ...], least: int) -> None:
    """Triton kernels equal the reference; how they are launched changes nothing."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *which],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("Triton 3.6's interpreter needs NumPy below 2.4 (int() of one-element arrays)")
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= least
