# SPDX-License-Identifier: Apache-2.0
"""`autoround quantize` is stopped at any instant, and the same command ends with the same bytes.

Commands are processes of their own (`forks`). They are killed from outside after a random time, or
just before, in the middle of, or just after one of the calls that change the disk.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zoo

FAST = ("--nsamples", "6", "--seqlen", "16", "--batch-size", "4", "--group-size", "32")
#: name -> model of the zoo, options
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "closed form": ("llama", (*FAST, "--bits", "3")),
    "signround": ("llama", (*FAST, "--iters", "2")),
    "two formats": ("qwen3", (*FAST, "--format", "auto_gptq,mlx", "--low-cpu-mem-usage")),
    "experts": ("qwen3_moe", (*FAST, "--format", "mlx")),
    "no model": ("mixtral", ("--recipe", "rtn", "--group-size", "32", "--max-shard-size", "1MB")),
    "model, no data": ("gpt2", ("--recipe", "rtn", "--group-size", "32")),
}
KILLED = -signal.SIGKILL
Answer = dict[str, Any]


class Forks:
    """Starts commands and waits for them."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.said = work / "said.txt"
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._read() == "ready"
        text = work / "text.jsonl"
        rows = [{"input_ids": [(3 + i * 7 + j) % 120 for j in range(16)]} for i in range(6)]
        text.write_text("\n".join(map(json.dumps, rows)))
        self._wholes: dict[str, dict[str, str]] = {}

    def _read(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def run(self, name: str, output: Path, options: tuple[str, ...] = (), **means: Any) -> Answer:
        """One of RUNS into a directory; ``means``: see `forks`."""
        model, own = RUNS[name]
        source = self.work / model
        if not source.exists():
            zoo.save(model, source)
        data = () if "rtn" in own else ("--dataset", str(self.work / "text.jsonl"))
        arguments = ["quantize", str(source), "-o", str(output), *own, *data, *options]
        assert self._server.stdin is not None
        wanted = {"arguments": arguments, "said": str(self.said), **means}
        print(json.dumps(wanted), file=self._server.stdin, flush=True)
        answer: Answer = json.loads(self._read())
        return answer

    def whole(self, name: str) -> tuple[dict[str, str], int, float]:
        """Every byte of an undisturbed run, its calls, its seconds."""
        if name not in self._wholes:
            out = self.work / name.replace(" ", "-")
            answer = self.run(name, out)
            assert answer["status"] == 0, self.said.read_text()
            self._wholes[name] = (digest(out), answer["calls"], answer["seconds"])
        return self._wholes[name]

    def resumed(self, name: str, output: Path) -> None:
        """The same command until its end: the same bytes, nothing beside them."""
        answer = self.run(name, output)
        assert answer["status"] == 0, self.said.read_text()
        assert digest(output) == self.whole(name)[0]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


def digest(path: Path) -> dict[str, str]:
    """All files but the log, which has times."""
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(path.rglob("*"))
        if f.is_file() and f.suffix != ".log"
    }


# ---- kill -9 ------------------------------------------------------------------------------------


def kills(forks: Forks, name: str, output: Path, random: random.Random, times: int) -> int:
    """Kill a run and then its resumed selves, at calls or at any time; how often it died."""
    _, calls, seconds = forks.whole(name)
    died = 0
    for _ in range(times):
        if random.random() < 0.6:
            how = random.choice(("before", "torn", "after"))
            answer = forks.run(name, output, fault=[random.randrange(calls), how])
        else:
            wait = random.random() * seconds
            answer = forks.run(name, output, kill=[wait, signal.SIGKILL])
        assert answer["status"] in (KILLED, 0), forks.said.read_text()
        died += answer["status"] == KILLED
    forks.resumed(name, output)
    return died


@pytest.mark.parametrize("name", RUNS)
def test_killed(name: str, forks: Forks, tmp_path: Path) -> None:
    """Twice: while it runs, and while it goes on."""
    chance, calls = random.Random(name), forks.whole(name)[1]
    fault = [chance.randrange(calls // 3, calls), chance.choice(("before", "torn", "after"))]
    assert forks.run(name, tmp_path / "out", fault=fault)["status"] == KILLED
    kills(forks, name, tmp_path / "out", chance, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(14))
@pytest.mark.parametrize("name", RUNS)
def test_killed_again_and_again(name: str, seed: int, forks: Forks, tmp_path: Path) -> None:
    chance = random.Random(f"{name} {seed}")
    assert kills(forks, name, tmp_path / "out", chance, chance.randint(2, 5))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "torn", "after"])
def test_killed_at_every_call(how: str, forks: Forks, tmp_path: Path) -> None:
    """Every point between two calls that change the disk, of one whole run."""
    name = "closed form"
    for number in range(forks.whole(name)[1]):
        out = tmp_path / str(number)
        assert forks.run(name, out, fault=[number, how])["status"] == KILLED
        forks.resumed(name, out)
