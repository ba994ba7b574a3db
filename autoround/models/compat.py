# SPDX-License-Identifier: Apache-2.0
"""Everything private we use of transformers (5.16 <= version < 6), in one place."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from autoround.errors import InputError
from autoround.files import read_json

_bar = Lock()


@dataclass(slots=True)
class Source:
    """How one in-memory tensor is made: checkpoint keys grouped by the converter's patterns, and
    the recipe ("copy", "rows", "experts", "experts_rows", or "other" where a row of it is not a row
    of a source)."""

    recipe: str
    groups: list[list[str]] = field(default_factory=list)

    @property
    def keys(self) -> tuple[str, ...]:
        """All checkpoint keys, group after group."""
        return tuple(key for group in self.groups for key in group)


def load_config(path: str, trust_remote_code: bool) -> Any:
    """The transformers config object of a local directory."""
    try:
        return transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (
        Exception
    ) as error:  # unknown model type, refused remote code, broken fields: all are the input's
        reason = " ".join(str(error).split())[:160]
        code = () if trust_remote_code else remote_code(path)
        remedy = (
            f"it would run {', '.join(code)}: read that, then pass --trust-remote-code "
            "(trust_remote_code=True if you trust its code)"
            if code
            else "update transformers, or download it again"
        )
        raise InputError(
            f"{path}: transformers {transformers.__version__} cannot read its config.json "
            f"({reason}); {remedy}"
        ) from error


def tokenizer_of(path: Path) -> tuple[Any, str]:
    """The checkpoint's own tokenizer; or None, and why there is none that loads."""
    for file in sorted(path.glob("*token*.json")):
        try:
            read_json(file)
        except InputError as error:
            return None, str(error)
    try:
        found = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        # Without any files transformers makes up a tokenizer of special tokens alone.
        return (found, "") if len(found) > 16 else (None, f"{path} has no tokenizer files")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of every kind, and panics of native code are no Exceptions
        reason = " ".join(str(error).split())[:160]
        return None, f"the tokenizer files in {path} do not load: {reason}"


def remote_code(path: str) -> list[str]:
    """Python files that a checkpoint's config.json asks to run, by the names it gives."""
    told = read_json(Path(path) / "config.json").get("auto_map")
    rows = told.values() if isinstance(told, dict) else ()
    names = [row for value in rows for row in (value if isinstance(value, list) else [value])]
    return sorted({f"{name.rpartition('.')[0]}.py" for name in names if isinstance(name, str)})


def skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The config's model class in eval mode: every parameter on meta, every buffer real."""
    with torch.device("meta"):
        model = _construct(config, dtype, trust_remote_code)
    if lost := _restore_buffers(model):
        # Remote code that computes a buffer only in __init__. This second way is not the first
        # choice because it allocates every parameter for a moment.
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            real = dict(_construct(config, dtype, trust_remote_code).named_buffers())
        for name in lost:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = real[name]
    model.eval().requires_grad_(False)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.use_cache = False  # a block that runs twice must not find its own keys in a cache
    return model


def model_class(config: Any) -> Any:
    """The class that a config names, where it is a model of transformers; else None."""
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known and found is not transformers.PreTrainedModel else None


#: What a router chooses, and of how many.
CHOICES = (
    ("top_k", "num_experts"),
    ("top_k", "n_routed_experts"),
    ("num_experts_per_tok", "num_experts"),
    ("topk_group", "n_group"),
)


def refuse_choices(model: nn.Module) -> None:
    """A router that chooses more than there is fails at the first token that reaches it, which may
    be hours away. (Some models without experts still count them: only their routers are asked.)"""
    for name, module in model.named_children():
        for inner, part in module.named_modules(prefix=name):
            for chosen, there in CHOICES:
                k, n = getattr(part, chosen, None), getattr(part, there, None)
                if isinstance(k, int) and isinstance(n, int) and n > 0 and not 1 <= k <= n:
                    raise InputError(
                        f"by its config.json {inner} chooses {chosen} = {k} of {there} = {n}; "
                        "correct that, or download it again"
                    )


def _construct(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    native = model_class(config)
    if native is not None and not (trust_remote_code and getattr(config, "auto_map", None)):
        return native._from_config(config, dtype=dtype)
    auto_map = getattr(config, "auto_map", None) or {}
    causal = (
        "AutoModelForCausalLM" in auto_map
        or type(config) in transformers.AutoModelForCausalLM._model_mapping
    )
    auto: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    try:
        return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"no model class for {config.architectures or config.model_type} ({reason}); "
            "update transformers"
        ) from error


def _restore_buffers(model: Any) -> list[str]:
    """Recompute all buffers the way from_pretrained does; returns those it does not reach."""
    once = _recompute(model, 1)
    again = _recompute(model, 0)
    return [name for name in once if not torch.equal(once[name], again[name])]


def _recompute(model: Any, fill: int) -> dict[str, Tensor]:
    """Fill every buffer, then let each model's _init_weights set its own."""
    for module in model.modules():
        owned = [name for name, buffer in module._buffers.items() if buffer is not None]
        module._is_hf_initialized = not owned
        for name in owned:
            old = module._buffers[name]
            module._buffers[name] = torch.full(old.shape, fill, dtype=old.dtype)
    model.initialize_weights()
    return dict(model.named_buffers(remove_duplicate=False))


def sources(model: Any, keys: Iterable[str]) -> tuple[dict[str, Source], list[str]]:
    """In-memory tensor name -> its source, and the checkpoint keys without a home."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    found: dict[str, Source] = {}
    unused: list[str] = []
    for key in sorted(
        keys, key=dot_natural_key
    ):  # the loader's own order; some renamings depend on it
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name not in state:
            unused.append(key)
            continue
        if pattern is None:
            found.setdefault(name, Source("copy", [[]])).groups[0].append(key)
            continue
        converter = by_pattern[pattern]
        first, *rest = converter.target_patterns
        for target in (name, *(name.replace(first, other) for other in rest)):
            source = found.setdefault(
                target, Source(_recipe(converter), [[] for _ in converter.source_patterns])
            )
            source.groups[converter.source_patterns.index(pattern)].append(key)
    return found, unused


def _recipe(converter: WeightConverter) -> str:
    if len(converter.target_patterns) != 1:
        return "other"
    match converter.operations:
        case [Concatenate(dim=0)]:
            return "rows"
        case [MergeModulelist(dim=0)]:
            return "experts"
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return "experts_rows"
    return "other"


def materialise(
    model: Any, tensors: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Set the parameters and buffers that these checkpoint tensors (or slices) make up, in place.

    Raises InputError for a shape that does not fit or a conversion that fails."""
    mapping: Any = get_model_conversion_mapping(model)
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=mapping,
        device_map={"": device},
    )
    with _no_bar():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config, None)
    for name, got, want in sorted(info.mismatched_keys):
        raise InputError(
            f"{name} has shape {tuple(got)} in the checkpoint, {tuple(want)} by its config; "
            "the config.json belongs to another checkpoint: download it again"
        )
    for name, text in info.conversion_errors.items():
        reason = " ".join(str(text).split())[-200:]
        raise InputError(
            f"{name} cannot be made from the checkpoint ({reason}); update transformers, "
            "or download it again"
        )


@contextmanager
def _no_bar() -> Iterator[None]:
    # transformers draws its "Loading weights" bar unconditionally; one a block drowns our own.
    module: Any = core_model_loading
    with _bar:
        kept, module.tqdm = module.tqdm, _plain
        try:
            yield
        finally:
            module.tqdm = kept


def _plain(items: Iterable[Any], desc: str = "") -> Iterable[Any]:
    return items


def tied(model: Any) -> dict[str, str]:
    """Tied parameter -> the parameter transformers ties it to."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer whose weight is stored [in, out]."""
    return type(module) is transformers.pytorch_utils.Conv1D


def to_meta(tensor: Tensor) -> nn.Parameter:
    """A parameter of the same shape and dtype without data."""
    return nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
