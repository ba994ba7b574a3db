# SPDX-License-Identifier: Apache-2.0
"""`verify` against damage: every kind in every format it can happen to, found and named."""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from autoround.export import export
from autoround.formats import formats_by_names
from autoround.options import build_recipe
from autoround.run import pipeline
from autoround.run.record import Source
from autoround.verify import verify

FORMATS = (
    "auto_round:gptqmodel", "auto_round:auto_gptq", "auto_gptq", "auto_gptq:v2", "auto_awq",
    "llm_compressor", "llm_compressor:int", "mlx", "fake:float32",
)  # fmt: skip
#: Format -> names of a module's codes, scales and zero levels ("" = none of its own).
PARTS = {
    "auto_awq": ("qweight", "scales", "qzeros"),
    "llm_compressor": ("weight_packed", "weight_scale", "weight_zero_point"),
    "llm_compressor:int": ("weight", "weight_scale", ""),
    "mlx": ("weight", "scales", "biases"),
    "fake:float32": ("weight", "", ""),
}
CODES, SCALES, ZEROS = range(3)
EIGHT = ("llm_compressor:int",)  # from a run in INT8
EXPERT, OTHER = (f"model.layers.1.mlp.experts.{e}.up_proj" for e in (2, 3))
Q = "model.layers.1.self_attn.q_proj"
ROUTER, NORM = "model.layers.1.mlp.gate", "model.layers.1.input_layernorm.weight"


@dataclass
class Files:
    """A directory in memory, between reading and writing it damaged."""

    path: Path
    format: str
    tensors: dict[str, torch.Tensor] = field(init=False)
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = load_file(self.path / "model.safetensors")
        self.config = json.loads((self.path / "config.json").read_text())

    @property
    def own(self) -> dict[str, Any]:
        own: dict[str, Any] = self.config.get("quantization") or self.config["quantization_config"]
        return own

    def part(self, module: str, kind: int) -> torch.Tensor:
        """A part of one module, a view that may be written."""
        name = PARTS.get(self.format, ("qweight", "scales", "qzeros"))[kind]
        where, _, rest = module.partition(".experts.")
        if self.format == "mlx" and rest:
            index, role = rest.split(".")
            return self.tensors[f"{where}.switch_mlp.{role}.{name}"][int(index)]
        return self.tensors[f"{module}.{name}"]

    def keys(self, module: str) -> list[str]:
        """Its tensors in the file, or those that it lies in."""
        where, _, rest = module.partition(".experts.")
        if self.format == "mlx" and rest:
            module = f"{where}.switch_mlp.{rest.split('.')[1]}"
        return [key for key in self.tensors if key.startswith(module + ".")]

    def save(self) -> None:
        save_file(self.tensors, self.path / "model.safetensors", {"format": "pt"})
        (self.path / "config.json").write_text(json.dumps(self.config))


def _flip(t: torch.Tensor, at: int = 0, bit: int = 0) -> None:
    """One bit of one element."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    flat = t.reshape(-1).view(whole)
    flat[at] ^= 1 << bit
    t.copy_(flat.view(t.dtype).view(t.shape))


def _code_bit(f: Files) -> None:
    _flip(f.part(EXPERT, CODES), 77, 5)


def _scale_bit(f: Files) -> None:
    _flip(f.part(EXPERT, SCALES), 3)


def _zero_bit(f: Files) -> None:
    _flip(f.part(EXPERT, ZEROS), 1, 2)


def _zero_shifted(f: Files) -> None:
    """Every zero level one up: the classic off-by-one."""
    zeros = f.part(EXPERT, ZEROS)
    if f.format == "mlx":
        zeros -= f.part(EXPERT, SCALES)
    else:
        zeros += torch.tensor(0x11111111, dtype=torch.int32)


def _kept_bit(f: Files) -> None:
    _flip(f.tensors[NORM], 5)


def _experts_swapped(f: Files) -> None:
    for kind in range(3):
        if (PARTS.get(f.format, ("qweight", "scales", "qzeros"))[kind]) != "":
            a, b = f.part(EXPERT, kind), f.part(OTHER, kind)
            a[:], b[:] = b.clone(), a.clone()


def _rows_swapped(f: Files) -> None:
    codes = f.part(Q, CODES)
    codes[:2] = codes[:2].flip(0)


def _dropped(f: Files) -> None:
    f.tensors.pop(f.keys(EXPERT)[0])


def _module_dropped(f: Files) -> None:
    for key in f.keys(EXPERT):
        f.tensors.pop(key)


def _kept_dropped(f: Files) -> None:
    f.tensors.pop(NORM)


def _stranger(f: Files) -> None:
    f.tensors["model.layers.9.input_layernorm.weight"] = f.tensors[NORM].clone()


def _scale(value: float) -> Callable[[Files], None]:
    def write(f: Files) -> None:
        f.part(EXPERT, SCALES).view(-1)[7] = value

    return write


def _other_dtype(f: Files) -> None:
    """The same bytes under another name."""
    key = next(key for key in f.keys(EXPERT) if f.tensors[key].dtype == torch.float16)
    f.tensors[key] = f.tensors[key].view(torch.bfloat16)


def _bits(f: Files) -> None:
    """The config names another width."""
    if "config_groups" in f.own:
        next(iter(f.own["config_groups"].values()))["weights"]["num_bits"] = 7
    else:
        f.own["bits"] = 7


def _group_size(f: Files) -> None:
    if "config_groups" in f.own:
        next(iter(f.own["config_groups"].values()))["weights"]["group_size"] = 16
    else:
        f.own["group_size"] = 64 if f.format == "mlx" else 16


def _symmetric(f: Files) -> None:
    if "config_groups" in f.own:
        next(iter(f.own["config_groups"].values()))["weights"]["symmetric"] = True
    elif "zero_point" in f.own:
        f.own["zero_point"] = False
    else:
        f.own["sym"] = True


def _skipped_forgotten(f: Files) -> None:
    """What stays in 16 bits is not said to."""
    for key in ("extra_config", "dynamic", "modules_in_block_to_quantize"):
        f.own.pop(key, None)
    for key in ("modules_to_not_convert", "ignore"):
        if key in f.own:
            f.own[key] = [name for name in f.own[key] if name != ROUTER]


def _said_to_be_skipped(f: Files) -> None:
    """A quantized module among those that stay."""
    if f.format == "mlx":
        f.own[Q] = False
    elif f.format.startswith("auto_gptq"):
        f.own["dynamic"] = {f"-:^{Q}$": {}} | f.own.get("dynamic", {})
    elif "extra_config" in f.own:
        f.own["extra_config"][Q] = {"bits": 16}
    else:
        f.own["ignore" if "ignore" in f.own else "modules_to_not_convert"].append(Q)


def _version(f: Files) -> None:
    """Zero levels read the other way."""
    if f.format.startswith("auto_gptq"):
        other = "gptq" if f.format.endswith("v2") else "gptq_v2"
        f.own["checkpoint_format"] = other
    else:
        other = "auto_round" if f.format.endswith("auto_gptq") else "auto_round:auto_gptq"
        f.own["packing_format"] = other


GPTQ = FORMATS[:4]
PACKED = tuple(f for f in FORMATS if not f.startswith("fake"))
ASYM = tuple(f for f in PACKED if f not in EIGHT)
SAYS_SYM = tuple(f for f in ASYM if f != "mlx")
#: Damage -> formats it can happen to, and a word that must be in a difference.
MUTATIONS: dict[str, tuple[Callable[[Files], None], tuple[str, ...], str]] = {
    "a bit of the codes": (_code_bit, FORMATS, EXPERT),
    "a bit of a scale": (_scale_bit, PACKED, EXPERT),
    "a bit of a zero level": (_zero_bit, ASYM, EXPERT),
    "zero levels one up": (_zero_shifted, ASYM, EXPERT),
    "a bit of a kept tensor": (_kept_bit, FORMATS, NORM),
    "two experts swapped": (_experts_swapped, FORMATS, EXPERT),
    "two rows of codes swapped": (_rows_swapped, FORMATS, Q),
    "a tensor dropped": (_dropped, FORMATS, "up_proj"),
    "a module dropped": (_module_dropped, FORMATS, "up_proj"),
    "a kept tensor dropped": (_kept_dropped, FORMATS, NORM),
    "a tensor of nobody": (_stranger, FORMATS, "layers.9"),
    "a scale that is NaN": (_scale(float("nan")), PACKED, EXPERT),
    "an infinite scale": (_scale(float("inf")), PACKED, EXPERT),
    "a scale of zero": (_scale(0.0), PACKED, EXPERT),
    "scales under another dtype": (_other_dtype, PACKED, "up_proj"),
    "bits in the config": (_bits, PACKED, "config.json says"),
    "group_size in the config": (_group_size, PACKED, "config.json says"),
    "sym in the config": (_symmetric, SAYS_SYM, "config.json says symmetric"),
    "a kept layer said to be quantized": (
        _skipped_forgotten, tuple(f for f in PACKED if f != "mlx"), ROUTER,
    ),
    "a quantized layer said to be kept": (_said_to_be_skipped, PACKED, Q),
    "the other kind of zero levels": (_version, GPTQ, "up_proj"),
}  # fmt: skip
CASES = [(name, format) for name, (_, formats, _) in MUTATIONS.items() for format in formats]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Format -> its directory, below the run it was made from: a mixture of experts."""
    where = tmp_path_factory.mktemp("runs")
    # Of random weights no zero level is 0, so that every format holds the run.
    model = zoo.save("qwen3_moe", where / "model", dtype=torch.float16)
    source = Source(model, torch.device("cpu"))
    made: dict[bool, Path] = {}
    for eight in (False, True):
        own: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": False}
        if eight:
            own = {"scheme": "INT8"}
        recipe = build_recipe("rtn", {"format": "auto_round", **own})
        made[eight] = where / f"run {eight}"
        pipeline.quantize(recipe, source, made[eight])
    for eight, run in made.items():
        names = [f for f in FORMATS if (f in EIGHT) == eight]
        export(run, formats_by_names(",".join(names)), run / "all", 1 << 20)
    return lambda format: _below(made[format in EIGHT], format)


def _below(run: Path, format: str) -> Path:
    named = run / "all" / format.replace(":", "-")
    return named if named.exists() else run / "all"


@pytest.fixture
def files(runs: Callable[[str], Path], tmp_path: Path) -> Callable[[str], tuple[Files, Path]]:
    """A copy to damage, and the run."""

    def get(format: str) -> tuple[Files, Path]:
        directory = runs(format)
        run = next(p for p in directory.parents if (p / "autoround.json").exists())
        shutil.copytree(directory, tmp_path / "copy")
        return Files(tmp_path / "copy", format), run

    return get


@pytest.mark.parametrize("format", FORMATS)
def test_rewriting_the_same_is_no_damage(format: str, files: Callable[..., Any]) -> None:
    copy, run = files(format)
    copy.save()
    verdict = verify(copy.path, run)
    assert verdict.ok, verdict.differences
    assert verdict.modules == 3 * (4 + 4 * 3)


@pytest.mark.parametrize(("name", "format"), CASES)
def test_damage_is_found_and_named(name: str, format: str, files: Callable[..., Any]) -> None:
    mutate, _, word = MUTATIONS[name]
    copy, run = files(format)
    mutate(copy)
    copy.save()
    verdict = verify(copy.path, run)
    assert not verdict.ok
    assert any(word in difference for difference in verdict.differences), verdict.differences


def _shards(copy: Files, twice: str) -> None:
    """Two files and their index; one tensor lies in both."""
    names = sorted(copy.tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    (copy.path / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        own = {*half, twice} if twice else {*half}
        save_file({n: copy.tensors[n] for n in own}, copy.path / file, {"format": "pt"})
        index |= dict.fromkeys(own, file)
    size = sum(t.nbytes for t in copy.tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (copy.path / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("format", FORMATS)
def test_a_tensor_in_two_shards(format: str, files: Callable[..., Any]) -> None:
    copy, run = files(format)
    key = copy.keys(EXPERT)[0]
    _shards(copy, key)
    verdict = verify(copy.path, run)
    assert any(key in difference for difference in verdict.differences), verdict.differences


@pytest.mark.parametrize("name", ["quantization_config.json", "quantize_config.json"])
def test_the_config_in_a_file_of_its_own(name: str, files: Callable[..., Any]) -> None:
    copy, run = files("auto_gptq:v2")
    assert json.loads((copy.path / name).read_text()) == copy.own
    (copy.path / name).write_text(json.dumps(copy.own | {"bits": 8}))
    verdict = verify(copy.path, run)
    assert verdict.differences == [f"{name} is not what config.json says"]


def test_shards_alone_are_no_damage(files: Callable[..., Any]) -> None:
    copy, run = files("auto_gptq:v2")
    _shards(copy, "")
    assert verify(copy.path, run).ok


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cut", [1, 4096])
def test_a_truncated_file(format: str, cut: int, files: Callable[..., Any]) -> None:
    copy, run = files(format)
    file = copy.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    verdict = verify(copy.path, run)
    assert "model.safetensors" in verdict.differences[0]


def test_damage_to_the_run_itself(files: Callable[..., Any], tmp_path: Path) -> None:
    copy, run = files("auto_gptq:v2")
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("all"))
    own = load_file(tmp_path / "run" / "model.safetensors")
    _flip(own[f"{EXPERT}.qweight"])
    save_file(own, tmp_path / "run" / "model.safetensors", {"format": "pt"})
    for directory, against in ((copy.path, tmp_path / "run"), (tmp_path / "run", None)):
        verdict = verify(directory, against)
        assert any(f"{EXPERT}.qweight" in difference for difference in verdict.differences)


#: Damage whose only trace is in what the run knew before it packed: the checksums of the files are
#: made to fit it.
UNSEEN = {"codes": CODES, "scales": SCALES, "zero levels": ZEROS}


@pytest.mark.parametrize("what", UNSEEN)
@pytest.mark.parametrize("format", [f for f in FORMATS if f not in ("mlx", "fake:float32")])
def test_exact_files_are_proven_alone(format: str, what: str, files: Callable[..., Any]) -> None:
    """A weight that is packed wrongly has the checksums of wrong words, and no such fingerprint."""
    copy, _ = files(format)
    assert verify(copy.path).recorded
    names = PARTS.get(format, ("qweight", "scales", "qzeros"))
    key = f"{EXPERT}.{names[UNSEEN[what]]}"
    if key not in copy.tensors:
        return  # symmetric
    raw = copy.tensors[key].view(torch.uint8).view(-1)
    raw[0] ^= 1
    copy.save()
    record = copy.path / "autoround.json"
    told = json.loads(record.read_text())
    told["checksums"][key] = f"{zlib.crc32(raw.numpy().tobytes()):08x}"
    record.write_text(json.dumps(told))
    verdict = verify(copy.path)
    assert verdict.differences == [f"{EXPERT}: the {what} are not those that the run found"]


def test_a_tensor_more_or_less_than_recorded(files: Callable[..., Any]) -> None:
    copy, _ = files("llm_compressor")
    copy.tensors["more"] = torch.zeros(3)
    del copy.tensors[NORM]
    copy.save()
    assert verify(copy.path).differences == [
        f"{NORM} is missing", "more is here and not in the run"
    ]  # fmt: skip
