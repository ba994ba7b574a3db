# SPDX-License-Identifier: Apache-2.0
"""`AutoRound`: the known tool's constructor and methods over a Recipe and the pipeline."""

import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoround.errors import InputError
from autoround.export import export
from autoround.formats import formats_by_names
from autoround.inference.loading import load
from autoround.options import build_recipe, default_output, device_by_name, split_names
from autoround.recipe import Recipe, shard_bytes
from autoround.run import pipeline
from autoround.run.artefact import places
from autoround.run.directory import check_output
from autoround.run.record import Run, Source
from autoround.scheme import Scheme
from autoround.settled import settled


class AutoRound:
    """Quantize a model from Python, with the names users know.

        ar = AutoRound("path/of/model", scheme="W4A16")
        ar.quantize_and_save("model-w4g128")

    ``model``: a checkpoint directory or hub id, or a loaded transformers model (it is saved to a
    temporary checkpoint first, so ``tokenizer`` must be given). None = the recipe's default.
    ``low_gpu_mem_usage``, ``enable_deterministic_algorithms``, ``enable_torch_compile`` change
    nothing, and a warning says what holds in every run (`autoround.settled`).
    Raises InputError for arguments that cannot work or have no effect.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        scheme: str | Scheme = "W4A16",
        *,
        recipe: str | None = None,
        bits: int | None = None,
        group_size: int | None = None,
        sym: bool | None = None,
        layer_config: Mapping[str, Any] | None = None,
        ignore_layers: str | Iterable[str] | None = None,
        quant_lm_head: bool = False,
        iters: int | None = None,
        end_to_end: int | None = None,
        lr: float | None = None,
        minmax_lr: float | None = None,
        enable_minmax_tuning: bool | None = None,
        not_use_best_mse: bool = False,
        dynamic_max_gap: int | None = None,
        enable_quanted_input: bool | None = None,
        dataset: str | Iterable[Any] | None = None,
        nsamples: int | None = None,
        seqlen: int | None = None,
        batch_size: int | None = None,
        gradient_accumulate_steps: int | None = None,
        momentum: float | None = None,
        enable_adam: bool = False,
        nblocks: int | None = None,
        to_quant_block_names: str | Iterable[str] | None = None,
        device_map: str | int | Mapping[str, str | int] | None = None,
        seed: int | None = None,
        low_cpu_mem_usage: bool = False,
        low_gpu_mem_usage: bool = False,
        enable_deterministic_algorithms: bool = False,
        enable_torch_compile: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        known = {
            "low_gpu_mem_usage": low_gpu_mem_usage,
            "enable_deterministic_algorithms": enable_deterministic_algorithms,
            "enable_torch_compile": enable_torch_compile,
        }
        for name in (name for name, given in known.items() if given):
            warnings.warn(f"{name} {settled(name)}", stacklevel=2)
        if isinstance(scheme, Scheme):
            bits = scheme.bits if bits is None else bits
            group_size = scheme.group_size if group_size is None else group_size
            sym = scheme.sym if sym is None else sym
            scheme = "W4A16"
        named = dataset if isinstance(dataset, str) else None
        ignored, blocks = (
            split_names(names) if isinstance(names, str) else names
            for names in (ignore_layers, to_quant_block_names)
        )
        self.recipe: Recipe = build_recipe(
            recipe,
            {
                "scheme": scheme,
                "bits": bits,
                "group_size": group_size,
                "sym": sym,
                "layer_config": layer_config,
                "ignore_layers": None if ignored is None else tuple(ignored),
                "quant_lm_head": quant_lm_head or None,
                "iters": iters,
                "end_to_end": end_to_end,
                "lr": lr,
                "minmax_lr": minmax_lr,
                "enable_minmax_tuning": enable_minmax_tuning,
                "not_use_best_mse": not_use_best_mse or None,
                "dynamic_max_gap": dynamic_max_gap,
                "enable_quanted_input": enable_quanted_input,
                "dataset": named,
                "nsamples": nsamples,
                "seqlen": seqlen,
                "batch_size": batch_size,
                "gradient_accumulate_steps": gradient_accumulate_steps,
                "momentum": momentum,
                "enable_adam": enable_adam or None,
                "nblocks": nblocks,
                "to_quant_block_names": None if blocks is None else tuple(blocks),
                "seed": seed,
            },
        )
        if not self.recipe.calibrates and dataset is not None:
            raise InputError(
                "dataset has no effect without tuning (iters=0); leave it out, or give iters"
            )
        self.tokenizer = tokenizer
        self.device = device_by_name(device_map)
        self.trust_remote_code, self.low_cpu_mem_usage = trust_remote_code, low_cpu_mem_usage
        self._dataset = None if isinstance(dataset, str) else dataset
        self._work = tempfile.TemporaryDirectory(prefix="autoround-")
        self._source = self._checkpoint(model)
        self._run: Run | None = None

    def _checkpoint(self, model: Any) -> str:
        """The model as a checkpoint directory; a loaded one is saved first."""
        if isinstance(model, str | Path):
            return str(model)
        if not hasattr(model, "save_pretrained"):
            raise InputError(
                f"model is a {type(model).__name__}; give a directory or a transformers model"
            )
        where = Path(self._work.name) / (Path(model.config.name_or_path).name or "model")
        model.save_pretrained(where)
        if self.tokenizer is not None and hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(where)
        return str(where)

    def quantize(self) -> tuple[Any, dict[str, Scheme]]:
        """Quantize; returns the model running on `hal.qgemm` and every layer's scheme."""
        out = Path(tempfile.mkdtemp(prefix="result-", dir=self._work.name))
        self._quantize(self.recipe, out)
        assert self._run is not None
        return load(out), dict(self._run.plan.contents.schemes)

    def save_quantized(self, output_dir: str | Path, format: str = "auto_round") -> Path:
        """Write what `quantize` made, in any format that holds it; else InputError.

        Several, comma between, each get a directory of their name.
        """
        if self._run is None:
            raise InputError("nothing is quantized yet; call quantize(), or quantize_and_save()")
        target = Path(output_dir)
        check_output(target)
        if format == self.recipe.format:
            shutil.copytree(self._run.output, target, dirs_exist_ok=True)
            return target
        size = shard_bytes(self.recipe.max_shard_size)
        export(self._run.output, formats_by_names(format), target, size)
        return target

    def quantize_and_save(
        self, output_dir: str | Path | None = None, format: str = "auto_round"
    ) -> tuple[Any, Path]:
        """Quantize into ``output_dir`` (new or empty); the loaded model and the directory.

        Of several formats, comma between, the first is loaded.
        """
        recipe = replace(self.recipe, format=format)
        target = Path(output_dir or default_output(self._source, recipe.weight_scheme))
        self._quantize(recipe, target)
        assert self._run is not None
        return load(places(self._run.plan.targets, target)[0]), target

    def _quantize(self, recipe: Recipe, output: Path) -> None:
        source = Source(self._source, self.device, self.trust_remote_code, self.low_cpu_mem_usage)
        self._run = pipeline.quantize(
            recipe, source, output, tokenizer=self.tokenizer, dataset=self._dataset
        )
