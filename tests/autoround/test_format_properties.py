# SPDX-License-Identifier: Apache-2.0
"""Every format that can hold a weight gives the same weight back, and so does every pair of them.

The weights are the awkward ones: zero levels at either end, negative scales, scales at the edges of
f16, groups of one level. The truth is ``scale * (code - zero)`` in f64 of the numbers drawn.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoround.errors import InputError
from autoround.export import convert
from autoround.formats import (
    CANONICAL,
    FORMATS,
    Contents,
    Format,
    Module,
    Quantized,
    Stored,
    target,
)
from autoround.formats.table import holds
from autoround.run.artefact import Artefact
from autoround.scheme import KEEP_BITS, Scheme
from autoround.verify import verify
from hal import QTensor, Spec

PACKED = [row for row in FORMATS.values() if not row.name.startswith("fake")]
NORM = "model.layers.0.input_layernorm.weight"
KEPT = "model.layers.0.mlp.gate"
DOWN, UP = (f"model.layers.0.mlp.{x}_proj" for x in ("down", "up"))
SHARD = 1 << 20


def _contents(home: Path, weights: Mapping[str, QTensor]) -> Contents:
    """A model of these weights, a norm and a router that stays."""
    (home / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float16"}))
    modules = {f"{name}.weight": Module.of(name, q) for name, q in weights.items()}
    shapes = {key: module.shape for key, module in modules.items()}
    shapes |= {NORM: (32,), f"{KEPT}.weight": (4, 32)}  # type: ignore[dict-item]
    tensors = {key: Stored(key, "F16", s, 2 * math.prod(s)) for key, s in shapes.items()}
    schemes = {module.name: module.scheme for module in modules.values()}
    base = next(iter(schemes.values()))
    return Contents(
        home, {"model_type": "llama", "dtype": "float16"}, tensors, modules,
        schemes | {KEPT: Scheme(KEEP_BITS)}, base, "model.layers",
    )  # fmt: skip


def _kept(key: str, shape: Sequence[int]) -> torch.Tensor:
    rng = torch.Generator().manual_seed(len(key))
    return torch.randn(*shape, generator=rng).half()


def _write(weights: Mapping[str, QTensor], formats: Sequence[Format], where: Path) -> Path:
    """A run of these weights in these formats, a directory each; returns the run."""
    home, run = where / "home", where / "run"
    home.mkdir()
    contents = _contents(home, weights)
    targets = [target(row, contents) for row in (CANONICAL, *formats)]
    with Artefact(contents, targets, run, SHARD, durable=False) as artefact:
        for key, stored in contents.tensors.items():
            if module := contents.modules.get(key):
                artefact.put(module, weights[module.name])
            else:
                artefact.keep(key, _kept(key, stored.shape), None)
    artefact.describe({})
    return run


def _truth(q: QTensor) -> torch.Tensor:
    """f64 [N, K], from the parts alone."""
    (_, k), scale = q.shape, q.parts["scale"].double()
    width = k // scale.shape[1]
    zero = q.parts.get("zero", torch.full_like(scale, q.spec.half)).double()
    codes = q.parts["codes"].double()
    return scale.repeat_interleave(width, 1) * (codes - zero.repeat_interleave(width, 1))


def _same(found: QTensor, given: QTensor) -> bool:
    """Codes and scales bit for bit; a weight that needs no zero levels may come without them."""
    codes = torch.equal(found.parts["codes"], given.parts["codes"])
    scale = torch.equal(found.parts["scale"], given.parts["scale"])
    return codes and scale and torch.equal(_truth(found), _truth(given))


SCALES = (1.0, 0.02, -0.02, -1.0, 1e-5, -1e-5, 6.0e-8, 0.333, -7.5)


@st.composite
def quantized(draw: st.DrawFn) -> QTensor:
    """A plain weight; every group takes its own kind of codes, zero level and scale."""
    bits = draw(st.integers(2, 8))
    n, k = 32 * draw(st.integers(1, 3)), 32 * draw(st.integers(1, 4))
    group = draw(st.sampled_from([g for g in (0, 16, 32, 64, 128) if k % (g or k) == 0]))
    asymmetric = draw(st.booleans())
    top = (1 << bits) - 1
    rng = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    groups = k // (group or k)

    def pick(values: Sequence[float]) -> torch.Tensor:
        own = torch.tensor(values)
        return own[torch.randint(len(values), (n, groups), generator=rng)]

    noise = torch.rand(n, groups, generator=rng) * 0.01
    scale = (pick(draw(st.lists(st.sampled_from(SCALES), min_size=1))) * (1 + noise)).half()
    codes = torch.randint(top + 1, (n, groups, k // groups), generator=rng)
    flat = draw(st.sampled_from([None, 0, top, 1 << (bits - 1)]))
    if flat is not None:  # some groups are all one level
        codes[torch.rand(n, groups, generator=rng) < 0.5] = flat
    parts = {"codes": codes.view(n, k).to(torch.uint8), "scale": scale}
    if asymmetric:
        ends = draw(st.lists(st.sampled_from([0, 1, 1 << (bits - 1), top]), min_size=1))
        parts["zero"] = pick(ends).to(torch.uint8)
    spec = Spec(f"{'u' if asymmetric else 's'}{bits}", group, "f16", "int" if asymmetric else "")
    return QTensor(spec, (n, k), "plain", parts)


@settings(max_examples=25)
@given(q=quantized())
def test_every_format_gives_the_weight_back(q: QTensor) -> None:
    with TemporaryDirectory() as scratch:
        module = Module.of(DOWN, q)
        formats = [row for row in FORMATS.values() if holds(row, [module])]
        assert {"auto_round", "llm_compressor", "fake"} <= {row.name for row in formats}
        run = _write({DOWN: q}, formats, Path(scratch))
        assert _same(Quantized(run / "canonical").q(DOWN), q)
        for row in formats:
            directory = run / row.name.replace(":", "-")
            verdict = verify(directory)
            assert verdict.ok, verdict.differences
            if row in PACKED:
                assert _same(Quantized(directory).q(DOWN), q), row.name


def _simple(spec: str, seed: int, n: int = 64, k: int = 128) -> QTensor:
    own = Spec.parse(spec)
    rng = torch.Generator().manual_seed(seed)
    groups = own.groups(k)
    codes = torch.randint(1 << own.bits, (n, k), generator=rng).to(torch.uint8)
    scale = torch.randn(n, groups, generator=rng).half()
    parts = {"codes": codes, "scale": torch.where(scale == 0, 1, scale).half()}
    if not own.symmetric:
        zero = torch.randint(1, 1 << own.bits, (n, groups), generator=rng)
        parts["zero"] = zero.to(torch.uint8)
    return QTensor(own, (n, k), "plain", parts)


@pytest.mark.parametrize("specs", [("s4:g32:f16",) * 2, ("u4:g64:f16:int",) * 2,
                                   ("s8:g64:f16", "u8:g32:f16:int"), ("s3:g32:f16", "s8:g64:f16")],
                         ids=["w4", "w4 asym", "w8 mixed", "w3 and w8"])  # fmt: skip
def test_every_pair_of_formats(specs: tuple[str, str], tmp_path: Path) -> None:
    """From any format to any other: the bytes that the run itself would have written."""
    pairs = zip((DOWN, UP), specs, strict=True)
    weights = {name: _simple(spec, i) for i, (name, spec) in enumerate(pairs)}
    modules = [Module.of(name, q) for name, q in weights.items()]
    formats = [row for row in PACKED if holds(row, modules)]
    assert len(formats) > 5
    run = _write(weights, formats, tmp_path)
    for row in formats:
        source = run / row.name.replace(":", "-")
        out = tmp_path / source.name
        others = [other for other in formats if other is not row]
        verdicts = convert(source, others, out, SHARD)
        assert all(verdict.ok for verdict in verdicts), verdicts
        for other in others:
            name = other.name.replace(":", "-")
            made, own = Quantized(out / name), Quantized(run / name)
            for module in weights:
                parts, truth = made.parts(module), own.parts(module)
                if "mlx" in row.name and row.name != other.name:
                    # MLX rounds -scale * zero, which says the zero level all the same.
                    assert _same(made.q(module), weights[module])
                assert parts.keys() == truth.keys()
                for part, tensor in parts.items():
                    assert torch.equal(tensor, truth[part]), (row.name, other.name, module, part)


@pytest.mark.parametrize("row", PACKED, ids=lambda row: row.name)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    row: Format, tmp_path: Path
) -> None:
    odd = {
        "auto_round": _simple("s4:g32:f16", 0, 48, 64),  # 48 rows
        "mlx": _simple("s4:g16:f16", 0),
        "llm_compressor:int": _simple("u8:g32:f16:int", 0),
        "auto_awq": _simple("s3:g32:f16", 0),
        "auto_gptq": _simple("s5:g32:f16", 0),
    }
    family = {"auto_round:mlx": "mlx", "auto_round:auto_awq": "auto_awq"}
    key = family.get(row.name, row.name)
    q = odd.get(key, odd["auto_gptq" if key == "auto_gptq:v2" else "auto_round"])
    with pytest.raises(InputError, match="cannot hold"):
        _write({DOWN: q}, [row], tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_zero_level_of_zero_has_no_place_in_version_1(tmp_path: Path) -> None:
    q = _simple("u4:g32:f16:int", 0)
    q.parts["zero"][3, 1] = 0
    refusing = [row.name for row in PACKED if not holds(row, [Module.of(DOWN, q)])]
    assert {"auto_gptq", "auto_round:auto_gptq"} <= {*refusing}
    with pytest.raises(InputError, match="zero level of 0"):
        _write({DOWN: q}, [FORMATS["auto_gptq"]], tmp_path)


@pytest.mark.parametrize(
    ("spec", "packing"),
    [
        ("s3:g32:f16", "auto_round:auto_gptq"),
        ("u4:g32:f16:int", "auto_round:auto_awq"),
        ("u3:g32:f16:int", "auto_round"),
    ],
)
def test_auto_round_picks_what_engines_read(spec: str, packing: str, tmp_path: Path) -> None:
    """Also where no zero level is 0, so that zero - 1 could be stored."""
    run = _write({DOWN: _simple(spec, 0)}, [FORMATS["auto_round"]], tmp_path)
    own = json.loads((run / "config.json").read_text())["quantization_config"]
    assert own["packing_format"] == packing


@settings(max_examples=25)
@given(q=quantized())
def test_mlx_tells_when_it_rounds(q: QTensor) -> None:
    """The error in the record is the largest difference between its weights and the run's."""
    module = Module.of(DOWN, q)
    assume(holds(FORMATS["mlx"], [module]))
    with TemporaryDirectory() as scratch:
        run = _write({DOWN: q}, [FORMATS["mlx"]], Path(scratch))
        parts = Quantized(run).parts(DOWN)
        width = q.spec.width(q.shape[1])
        scales, biases = (
            parts[x].double().repeat_interleave(width, 1) for x in ("scales", "biases")
        )
        codes = q.parts["codes"].double()
        error = float((scales * codes + biases - _truth(q)).abs().max())
        said = json.loads((run / "autoround.json").read_text())["largest_error"]
        assert error <= said * (1 + 1e-5) + 1e-12  # said: at both ends of the codes, in f32


@pytest.mark.parametrize(
    ("saved", "added"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5}, {}),
        ({"num_local_experts": 4}, {"num_experts": 4}),
        ({"rope_theta": 1e4}, {}),
    ],
)
def test_mlx_finds_what_transformers_5_renamed(
    saved: dict[str, object], added: dict[str, object], tmp_path: Path
) -> None:
    contents = replace(_contents(tmp_path, {DOWN: _simple("s4:g32:f16", 0)}), config=saved)
    row = FORMATS["mlx"]
    own = row.config(contents, row.packings[0])
    names = ("rope_theta", "rope_scaling", "num_experts")
    assert {key: value for key, value in own.items() if key in names} == added
