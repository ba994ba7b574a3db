# SPDX-License-Identifier: Apache-2.0
"""`autoround quantize` is stopped at any instant, and the same command ends with the same bytes.

Commands are processes of their own (`forks`). They are killed from outside after a random time, or
just before, in the middle of, or just after one of the calls that change the disk.
"""

import fcntl
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    "end to end": (
        "llama",
        (*FAST, "--end-to-end", "2", "--format", "auto_gptq,mlx", "--bits", "2"),
    ),
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

    def run(self, name: str, output: Path, **means: Any) -> Answer:
        """One of RUNS into a directory; ``means``: see `forks`."""
        model, own = RUNS[name]
        source = self.work / model
        if not source.exists():
            zoo.save(model, source)
        data = () if "rtn" in own else ("--dataset", str(self.work / "text.jsonl"))
        arguments = ["quantize", str(source), "-o", str(output), *own, *data, "--quiet"]
        assert self._server.stdin is not None
        wanted = {"arguments": arguments, "said": str(self.said), **means}
        print(json.dumps(wanted), file=self._server.stdin, flush=True)
        answer: Answer = json.loads(self._read())
        return answer

    def size(self) -> int:
        """Bytes of addresses that a command has before it begins."""
        text = Path(f"/proc/{self._server.pid}/statm").read_text()
        return int(text.split()[0]) * resource.getpagesize()

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


def kill(forks: Forks, name: str, output: Path, chance: random.Random) -> bool:
    """Run until a call or a time; whether it died of that."""
    _, calls, seconds = forks.whole(name)
    if chance.random() < 0.6:
        how = chance.choice(("before", "torn", "after"))
        answer = forks.run(name, output, fault=[chance.randrange(calls), how])
    else:
        wait = chance.random() * seconds
        answer = forks.run(name, output, kill=[wait, signal.SIGKILL])
    assert answer["status"] in (KILLED, 0), forks.said.read_text()
    return bool(answer["status"] == KILLED)


@pytest.mark.parametrize("name", RUNS)
def test_killed(name: str, forks: Forks, tmp_path: Path) -> None:
    """Late in a run, and again while it goes on."""
    chance, calls = random.Random(name), forks.whole(name)[1]
    fault = [chance.randrange(calls // 2, calls), chance.choice(("before", "torn", "after"))]
    assert forks.run(name, tmp_path / "out", fault=fault)["status"] == KILLED
    kill(forks, name, tmp_path / "out", chance)
    forks.resumed(name, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", RUNS)
def test_killed_again_and_again(name: str, seed: int, forks: Forks, tmp_path: Path) -> None:
    """Three times on its way to the end; a run that gets there begins anew. 252 in all."""
    chance, died, out = random.Random(f"{name} {seed}"), 0, tmp_path / "0"
    while died < 3:
        if kill(forks, name, out, chance):
            died += 1
        else:
            assert digest(out) == forks.whole(name)[0]
            out = out.with_name(str(int(out.name) + 1))
    forks.resumed(name, out)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "torn", "after"])
def test_killed_at_every_call(how: str, forks: Forks, tmp_path: Path) -> None:
    """Every third point between two calls that change the disk, each way one of the three."""
    name = "closed form"
    for number in range(("before", "torn", "after").index(how), forks.whole(name)[1], 3):
        out = tmp_path / str(number)
        assert forks.run(name, out, fault=[number, how])["status"] == KILLED
        forks.resumed(name, out)


def test_stopped_at_its_very_end(forks: Forks, tmp_path: Path) -> None:
    """Proven, the journal going: what is left of it is no run, and goes."""
    calls = forks.whole("closed form")[1]
    for before in (1, 3, 5, 7):
        out = tmp_path / str(before)
        fault = [calls - before, "before"]
        assert forks.run("closed form", out, fault=fault)["status"] == KILLED
        forks.resumed("closed form", out)


# ---- asked to stop ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop(number: int, forks: Forks, tmp_path: Path) -> None:
    """One line that says what is kept, the usual exit code, and then the same bytes."""
    out, told = tmp_path / "out", ""
    for share in (0.95, 0.9, 0.8, 0.7, 0.5):  # until it has committed something and not ended
        seconds = forks.whole("closed form")[2]
        answer = forks.run("closed form", out, kill=[share * seconds, number])
        told = forks.said.read_text()
        assert answer["status"] in (0, 128 + number), told
        if answer["status"] and "blocks are kept" in told:
            break
        if answer["status"]:
            assert "nothing was left behind" in told
            assert not out.exists()
        out = out.with_name(f"{out.name}-")
    assert told.count("\n") <= 2
    if "blocks are kept" in told:
        assert f"are kept in {out}: the same command goes on from there" in told
    forks.resumed("closed form", out)


# ---- what a run needs and does not get ----------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
def test_disk_that_fills(share: float, forks: Forks, tmp_path: Path) -> None:
    calls, out = forks.whole("closed form")[1], tmp_path / "out"
    answer = forks.run("closed form", out, fault=[int(share * calls), "full"])
    told = forks.said.read_text()
    assert answer["status"] == 2, told
    assert told.count("error: ") == 1
    assert "free some space" in told
    assert ("blocks are kept" in told) == out.exists()
    forks.resumed("closed form", out)


@contextmanager
def mounted(where: Path, options: str) -> Iterator[Path]:
    """A file system in memory."""
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(where)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.mark.parametrize("part", [0.5, 1.0], ids=["weights", "chains"])
def test_real_disk_that_is_full(part: float, forks: Forks, tmp_path: Path) -> None:
    """Too small for the files, which is seen before any work; too small for what passes on."""
    forks.whole("two formats")
    files = [p for p in (forks.work / "two-formats").rglob("*") if p.is_file()]
    held = sum(-(-p.stat().st_size // 4096) * 4096 for p in files if p.suffix == ".safetensors")
    with mounted(tmp_path / "disk", f"size={int(part * held) + 49152}") as disk:
        answer = forks.run("two formats", disk / "out")
        told = forks.said.read_text()
        assert answer["status"] == 2, told
        assert re.search("cannot hold" if part < 1 else "No space left|no room for", told)
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=80m", str(disk)], check=True)
        forks.resumed("two formats", disk / "out")


def test_output_that_cannot_be_written(forks: Forks, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        assert forks.run("closed form", disk / "out")["status"] == 2
        assert "cannot write to" in forks.said.read_text()
        assert "Read-only" in forks.said.read_text()


def test_files_that_may_not_grow(forks: Forks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = forks.run("closed form", out, limits={"RLIMIT_FSIZE": 20_000})
    assert answer["status"] == 2, forks.said.read_text()
    assert forks.said.read_text().count("error: ") == 1
    assert not out.exists()
    forks.resumed("closed form", out)


@pytest.mark.slow
@pytest.mark.parametrize("more", [1 << 26, 1 << 28, 1 << 29])
def test_memory_that_ends(more: int, forks: Forks, tmp_path: Path) -> None:
    """One line, whatever it is that does not get its memory; then the same bytes."""
    out = tmp_path / "out"
    answer = forks.run("closed form", out, limits={"RLIMIT_AS": forks.size() + more})
    assert answer["status"] in (0, 1, 2), forks.said.read_text()
    assert "Traceback" not in forks.said.read_text()
    forks.resumed("closed form", out)


def test_second_run_in_one_directory(forks: Forks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calls = forks.whole("closed form")[1]
    forks.run("closed form", out, fault=[calls // 2, "before"])
    with (out / "journal/lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        answer = forks.run("closed form", out)
    assert answer["status"] == 2
    assert "another run is writing to" in forks.said.read_text()
    assert answer["seconds"] < forks.whole("closed form")[2]
    forks.resumed("closed form", out)


def test_a_writer_that_dies(forks: Forks, tmp_path: Path) -> None:
    """An error in a thread that writes ends the run as any other does."""
    calls, out = forks.whole("two formats")[1], tmp_path / "out"
    answer = forks.run("two formats", out, fault=[int(0.6 * calls), "broken"])
    assert answer["status"] == 1, forks.said.read_text()
    assert "ZeroDivisionError" in forks.said.read_text()
    forks.resumed("two formats", out)
