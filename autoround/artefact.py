# SPDX-License-Identifier: Apache-2.0
"""The output directory around the weights: refusal, cleanup, companions, run record, config."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from autoround.checkpoint import companions
from autoround.errors import InputError
from autoround.formats import CANONICAL, RECORD, Contents, Export, Module, Target
from autoround.formats.canonical import to_json
from autoround.plan import ModelPlan
from autoround.version import VERSION
from hal import QTensor


def check_output(output: Path) -> None:
    """Refuse an output that would overwrite something or cannot be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output {output} exists and is not empty; choose a new directory with -o")
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    try:
        probe = parent / ".autoround-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to {parent} ({error.strerror}); choose another -o"
        ) from None


@contextlib.contextmanager
def output_directory(output: Path) -> Iterator[None]:
    """Create the directory; a failed run takes away what it made."""
    made = [path for path in (output, *output.absolute().parents) if not path.exists()]
    output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        for path in output.iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
        for path in made:
            with contextlib.suppress(OSError):  # someone else has put something there since
                path.rmdir()
        if isinstance(error, OSError):
            raise InputError(
                f"stopped while writing {output} ({error}); free some space or choose another -o"
            ) from error
        raise


class Artefact(ExitStack):
    """A run's directory: our own files, and the formats made from them; weights go to all at once.

    With one format its files lie in ``output`` itself, with several each has a directory of its
    name there. Our own are always in ``output/canonical``, complete, so that every other format can
    be made later (`autoround.export`). Leaving the context finishes the files of weights; without
    `describe` no reader takes a directory for a model.
    """

    def __init__(
        self, contents: Contents, targets: Sequence[Target], output: Path, max_shard: int,
        *, durable: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.contents = contents
        self.exports = tuple(
            Export(target, place, max_shard, durable=durable)
            for target, place in zip(targets, places(targets, output), strict=True)
        )
        self._threads: list[ThreadPoolExecutor] = []
        self._writing: list[Future[None]] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for export in self.exports:
                export.directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(export.sink)
            # Packing, checksums and writing go on while the next weight is tuned.
            threads = (torch.set_num_threads, (torch.get_num_threads(),))
            self._threads = [
                stack.enter_context(ThreadPoolExecutor(1, f"write {n}", *threads))
                for n in range(len(self.exports))
            ]
            stack.push(self._settle)
            self.push(stack.pop_all())
        return self

    def put(self, module: Module, q: QTensor) -> None:
        """Write one module's plain weight; its tensors must not be changed afterwards."""
        self._hand(lambda export: export.put(module, q))

    def keep(self, key: str, raw: Tensor) -> None:
        """Write one tensor that stays."""
        self._hand(lambda export: export.keep(key, raw))

    def _hand(self, write: Callable[[Export], None]) -> None:
        self._wait()
        pairs = zip(self._threads, self.exports, strict=True)
        self._writing = [thread.submit(write, export) for thread, export in pairs]

    def _wait(self) -> None:
        """For the tensor before: no more than one is held back. Raises what its writers raised."""
        writing, self._writing = self._writing, []
        for future in writing:
            future.result()

    def _settle(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._wait()

    def describe(self, run: Mapping[str, Any]) -> None:
        """Everything beside the weights; ``run``: what the run knows of itself.

        config.json comes last: without it no reader takes a directory for a finished model.
        """
        for export in self.exports:
            write_companions(self.contents.home, export.directory)
            record = {**run, **_own_record(export)}
            (export.directory / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            _write_config(export)


def places(targets: Sequence[Target], output: Path) -> list[Path]:
    """The directory of every target below ``output``."""
    named = [t for t in targets if t.format is not CANONICAL]
    return [
        output / CANONICAL.name
        if t.format is CANONICAL
        else output / t.format.name.replace(":", "-")
        if len(named) > 1
        else output
        for t in targets
    ]


def run_record(plan: ModelPlan, run: Mapping[str, Any]) -> dict[str, Any]:
    """What was done with every tensor, and with which versions; ``run`` adds what the run knows."""
    versions = {
        "autoround": VERSION,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    return {**versions, **run, "tensors": plan.fates, "kept": plan.kept_because}


#: Rows of a record that belong to one directory and not to the run.
OF_FORMAT = ("format", "packing", "largest_error", "checksums", "contents")


def _own_record(export: Export) -> dict[str, Any]:
    """What is true of one directory: its format, what it lost, its bytes, its contents."""
    target = export.target
    own: dict[str, Any] = {
        "format": target.format.name,
        "packing": target.packing.name,
        "largest_error": max(export.errors.values(), default=0.0),
        "checksums": {name: f"{crc:08x}" for name, crc in sorted(export.checksums.items())},
    }
    if target.format is CANONICAL:
        own["contents"] = to_json(target.contents)
    return own


def write_companions(home: Path, output: Path) -> None:
    """Tokenizer and every other file that travels with the model."""
    for path in companions(home):
        target = output / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(home / path, target)


def _write_config(export: Export) -> None:
    own = export.target.config()
    for name in export.target.format.files:
        text = json.dumps(own["quantization_config"], indent=2) + "\n"
        (export.directory / name).write_text(text)
    dtype = own.pop("torch_dtype", None)
    config = {**export.target.contents.config, **own}
    partial = export.directory / "config.json.partial"
    text = json.dumps(_in_dtype(config, dtype) if dtype else config, indent=2, ensure_ascii=False)
    partial.write_text(text + "\n")
    partial.replace(export.directory / "config.json")


def _in_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config of a model whose floats are written in another dtype, at every level."""
    named: dict[str, Any] = {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {
        "dtype": dtype
    }
    inner = {
        key: _in_dtype(value, dtype)
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, dict) and "dtype" in str(value.keys())
    }
    return {**config, **named, **inner}
