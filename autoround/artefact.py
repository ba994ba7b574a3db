# SPDX-License-Identifier: Apache-2.0
"""The output directory around the weights: refusal, cleanup, companions, run record, config."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from autoround.checkpoint import Checkpoint
from autoround.errors import InputError
from autoround.formats import ShardSink
from autoround.plan import ModelPlan
from autoround.version import VERSION

#: File beside the weights that says how they were made. No times or paths: equal runs, equal bytes.
RECORD = "autoround.json"


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


def copy_kept(checkpoint: Checkpoint, plan: ModelPlan, sink: ShardSink) -> None:
    """Tensors that stay, byte for byte."""
    for key, fate in plan.fates.items():
        if fate.startswith("copied"):
            sink.put_bytes(key, checkpoint.get(key))


def write_companions(checkpoint: Checkpoint, output: Path) -> None:
    """Tokenizer and every other file that travels with the model."""
    for path in checkpoint.companions():
        target = output / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.path / path, target)


def write_record(plan: ModelPlan, run: dict[str, Any], output: Path) -> None:
    """What was done with every tensor, and with which versions; ``run`` adds what the run knows."""
    versions = {
        "autoround": VERSION,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    fates = {"packing": plan.packing.name, "tensors": plan.fates, "kept": plan.kept_because}
    (output / RECORD).write_text(json.dumps({**versions, **run, **fates}, indent=1) + "\n")


def write_config(checkpoint: Checkpoint, plan: ModelPlan, output: Path) -> None:
    """``config.json`` last: without it, no reader takes the directory for a finished model."""
    own = plan.quantization_config()
    (output / "quantization_config.json").write_text(json.dumps(own, indent=2) + "\n")
    config = {**checkpoint.config, "quantization_config": own}
    partial = output / "config.json.partial"
    partial.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    partial.replace(output / "config.json")
