# SPDX-License-Identifier: Apache-2.0
"""Another project's code in a process and an environment of its own, asked line by line in JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
#: The environment of the peers that compute products; ``make peers`` makes it.
WHERE = Path(".cache/peers/kernels")
PYTHON = WHERE / "bin" / "python"
ABSENT = "not installed: make peers"
PACKAGES = (
    "torch==2.13.0", "auto-round-lib==0.16.0", "gguf==0.19.0", "safetensors==0.8.0",
    "llama-cpp-python==0.3.36",
)  # fmt: skip
#: Without the flags GCC 12 drops stores to a tile configuration that ggml hands to its ldtilecfg
#: macro, and the first product on AMX ends the process.
BUILD = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'"}


def installed() -> bool:
    """Whether the peers can be asked here."""
    return (WHERE / ".ready").exists()


def environment(
    where: Path, packages: Iterable[Sequence[str]], build: Mapping[str, str] = {}
) -> Path:
    """The Python of a virtual environment, made on first use: each group of packages in turn."""
    python = where / "bin" / "python"
    if not (where / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(where)], check=True)
        for group in packages:
            command = [str(python), "-m", "pip", "install", "-q", *group]
            subprocess.run(command, check=True, env={**os.environ, **build})
        (where / ".ready").touch()
    return python


def install() -> None:
    """The environment of the peers that compute products; compiling llama.cpp takes minutes."""
    environment(WHERE, ([package] for package in PACKAGES), BUILD)


#: Threads that spin after their work would take a core from whoever is measured next: our products
#: on two threads took 2.7 ms beside such a peer instead of 0.27.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


class Peer:
    """A running script of ``benchmarks/peers``."""

    def __init__(self, script: str, *words: str) -> None:
        command = [str(PYTHON), str(HERE / "peers" / script), *words]
        self._process = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | QUIET,
        )

    def ask(self, what: str, *values: Any) -> Any:
        """The answer to one question; the peer runs nothing between questions."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, *values]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
