# SPDX-License-Identifier: Apache-2.0
"""The table of `run_auto_round.py` as tests; ``AUTOROUND_PEER_PYTHON`` names the peer's python."""

import os
from pathlib import Path

import pytest
from run_auto_round import CASES, Bench, Case

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.direction} {c.name}")
def test_same_logits(case: Case, tmp_path: Path) -> None:
    outcome = Bench(os.environ["AUTOROUND_PEER_PYTHON"], tmp_path).run(case)
    assert outcome.verdict in {"ok", "peer" if case.peer_cannot else "ok"}, outcome
