# SPDX-License-Identifier: Apache-2.0
"""Rules of vLLM and SGLang: cases with known answers, and remedies that leave nothing to refuse."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround.errors import InputError
from autoround.formats import FORMATS as ROWS
from autoround.formats import Contents, Module, Stored
from autoround.formats.engines import ENGINES, READERS, Violation, layers, violations
from autoround.scheme import KEEP_BITS, Scheme

Fields = dict[str, Any]
W4, W8, W3, KEPT = Scheme(4), Scheme(8), Scheme(3), Scheme(KEEP_BITS)
ASYM = Scheme(4, sym=False)
#: One dense block of a small Llama: module -> [N, K].
BLOCK = {
    "self_attn.q_proj": (512, 512), "self_attn.k_proj": (128, 512), "self_attn.v_proj": (128, 512),
    "self_attn.o_proj": (512, 512), "mlp.gate_proj": (1024, 512), "mlp.up_proj": (1024, 512),
    "mlp.down_proj": (512, 1024),
}  # fmt: skip
SHAPES = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()}
EXPERTS = {
    f"model.layers.2.mlp.experts.{e}.{name}": shape
    for e in range(3)
    for name, shape in (
        ("gate_proj", (256, 512)),
        ("up_proj", (256, 512)),
        ("down_proj", (512, 256)),
    )
}
LLAMA, MOE = SHAPES, SHAPES | EXPERTS
L0 = "model.layers.0."
QKV = tuple(f"{L0}self_attn.{x}_proj" for x in "qkv")


def _model(shapes: Mapping[str, tuple[int, int]], **changes: Scheme) -> dict[str, Scheme]:
    """W4G128, with other schemes for the names that end so (``_`` for a dot)."""
    table = dict.fromkeys(shapes, W4)
    for end, scheme in changes.items():
        found = [name for name in shapes if name.replace(".", "_").endswith(end)]
        assert found, end
        table |= dict.fromkeys(found, scheme)
    return table


def _apply(modules: dict[str, Scheme], found: list[Violation]) -> dict[str, Scheme]:
    for violation in found:
        assert violation.remedy is not None
        modules = modules | dict(violation.remedy)
    return modules


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "format", ["auto_round", "auto_gptq", "auto_gptq:v2", "auto_awq", "llm_compressor"]
)
@pytest.mark.parametrize("shapes", [LLAMA, MOE], ids=["llama", "moe"])
def test_uniform_four_bits_pass(engine: str, format: str, shapes: dict) -> None:
    assert violations(engine, format, _model(shapes), shapes) == []
    head = shapes | {"lm_head": (1024, 512)}
    assert violations(engine, format, _model(head, lm_head=KEPT), head) == []


#: (engine, format, modules by their endings, the words of the reason, modules, their remedy)
CASES = [
    ("vllm", "auto_round", {"layers_0_self_attn_q_proj": W8}, "one scheme", QKV, W8),
    ("vllm", "llm_compressor", {"layers_0_self_attn_v_proj": KEPT}, "one scheme", QKV, KEPT),
    ("sglang", "auto_gptq", {"layers_0_self_attn_k_proj": Scheme(4, 32)}, "one scheme", QKV,
     Scheme(4, 32)),
    ("sglang", "auto_round", {"layers_0_self_attn_k_proj": W3}, "no kernel for 3 bits", QKV, W4),
    ("vllm", "auto_gptq", {"layers_0_mlp_down_proj": W3}, "it has in auto_round:auto_gptq, llm_co",
     (f"{L0}mlp.down_proj",), W4),
    ("vllm", "auto_round", {"layers_0_mlp_down_proj": Scheme(5, sym=False)},
     "no kernel for 5 bits g128 asym", (f"{L0}mlp.down_proj",), Scheme(5)),
    ("vllm", "auto_awq", {"layers_0_mlp_down_proj": W8}, "no kernel for 8 bits",
     (f"{L0}mlp.down_proj",), KEPT),
    ("vllm", "auto_awq", {"layers_0_mlp_down_proj": Scheme(4, 32)}, "one group_size, 128",
     (f"{L0}mlp.down_proj",), W4),
    ("vllm", "auto_gptq", {"layers_0_mlp_down_proj": Scheme(4, 256)}, "group_size -1, 32, 64, 128",
     (f"{L0}mlp.down_proj",), W4),
    ("sglang", "llm_compressor", {"layers_0_mlp_down_proj": Scheme(8, sym=False)},
     "no kernel for 8 bits g128 asym", (f"{L0}mlp.down_proj",), W8),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "format", "changes", "words", "modules", "remedy"), CASES)
def test_a_refusal_and_its_remedy(
    engine: str,
    format: str,
    changes: dict[str, Scheme],
    words: str,
    modules: tuple[str, ...],
    remedy: Scheme,
) -> None:
    found = violations(engine, format, _model(LLAMA, **changes), LLAMA)
    assert any(words in violation.reason for violation in found), found
    assert {violation.modules for violation in found} == {modules}
    assert all(v.remedy == dict.fromkeys(modules, remedy) for v in found)


def test_all_experts_are_one_layer() -> None:
    model = _model(MOE, experts_1_up_proj=W8)
    for engine in ENGINES:
        (found,) = violations(engine, "auto_round", model, MOE)
        assert "model.layers.2.mlp.experts of these" in found.reason
        assert found.remedy == dict.fromkeys(EXPERTS, W8)


@pytest.mark.parametrize(
    ("format", "words"),
    [
        ("auto_round:gptqmodel", "packings"),
        ("mlx", "MLX"),
        ("auto_round:mlx", "MLX"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_formats_an_engine_does_not_read(engine: str, format: str, words: str) -> None:
    (found,) = violations(engine, format, _model(LLAMA), LLAMA)
    assert words in found.reason
    assert found.modules == tuple(LLAMA)
    assert found.remedy is None


def test_experts_without_a_kernel_are_kept() -> None:
    rows = dict.fromkeys(MOE, Scheme(8, -1))
    assert violations("vllm", "llm_compressor:int", rows, MOE) == []
    (found,) = violations("sglang", "llm_compressor:int", rows, MOE)
    assert "no kernel for experts" in found.reason
    assert found.remedy == dict.fromkeys(EXPERTS, KEPT)


def test_asymmetric_with_other_widths_would_be_packed_raw() -> None:
    # auto_round then writes the packing that neither engine knows: 4 bits go, other widths do not.
    assert violations("vllm", "auto_round", dict.fromkeys(LLAMA, ASYM), LLAMA) == []
    mixed = _model(LLAMA, down_proj=ASYM)
    assert violations("vllm", "auto_round", mixed, LLAMA) == []
    model = _model(LLAMA) | dict.fromkeys(LLAMA, Scheme(3, sym=False))
    found = violations("vllm", "auto_round", model, LLAMA)
    assert all("it has in llm_compressor" in violation.reason for violation in found)
    assert set(_apply(model, found).values()) == {W3}


def test_sglang_does_not_pad_to_tiles() -> None:
    odd = {"model.layers.0.mlp.down_proj": (96, 256), "model.layers.0.self_attn.o_proj": (64, 96)}
    model = dict.fromkeys(odd, Scheme(4, 32))
    found = violations("sglang", "auto_gptq", model, odd)
    assert [set(v.remedy.values()) for v in found if v.remedy] == [{KEPT}, {KEPT}]
    assert violations("vllm", "auto_gptq", model, odd) == []


def test_tiles_are_counted_on_the_fused_layer() -> None:
    odd = {f"a.{x}_proj": (rows, 256) for x, rows in zip("qkv", (128, 32, 32), strict=True)}
    assert violations("sglang", "auto_gptq", dict.fromkeys(odd, W4), odd) == []


def test_a_group_that_does_not_divide_is_made_smaller() -> None:
    odd = {"model.layers.0.mlp.down_proj": (64, 192)}
    (found,) = violations("vllm", "auto_gptq", dict.fromkeys(odd, W4), odd)
    assert found.remedy == dict.fromkeys(odd, Scheme(4, 64))


def test_awq_takes_a_layer_for_a_kept_one_by_its_name() -> None:
    odd = {"model.layers.0.mlp.gate": (64, 256), "model.layers.0.mlp.gate_proj": (256, 256)}
    model = {"model.layers.0.mlp.gate": KEPT, "model.layers.0.mlp.gate_proj": W4}
    (found,) = violations("sglang", "auto_awq", model, odd)
    assert found.modules == ("model.layers.0.mlp.gate_proj",)
    assert "by its name" in found.reason
    assert violations("sglang", "auto_gptq", model, odd) == []


def test_plain_files_are_anyones() -> None:
    for engine in ENGINES:
        for format in ("fake", "fake:float32"):
            assert violations(engine, format, dict.fromkeys(LLAMA, Scheme(2, 16)), LLAMA) == []
        assert violations(engine, "mlx", dict.fromkeys(LLAMA, KEPT), LLAMA) == []


def test_unknown_names_are_refused_at_the_border() -> None:
    with pytest.raises(InputError, match="vllm, sglang"):
        violations("ollama", "auto_gptq", _model(LLAMA), LLAMA)
    with pytest.raises(InputError, match="'gguf'"):
        violations("vllm", "gguf", _model(LLAMA), LLAMA)


@pytest.mark.parametrize(
    ("names", "built"),
    [
        (["a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj"], ["a.qkv_proj", "a.o_proj"]),
        (["a.q_proj", "b.k_proj"], ["a.q_proj", "b.k_proj"]),
        (["a.q_a_proj", "a.q_b_proj", "a.kv_a_proj_with_mqa"],
         ["a.fused_qkv_a_proj", "a.q_b_proj"]),
        (["a.q_proj", "a.kv_a_proj_with_mqa"], ["a.q_proj", "a.kv_a_proj_with_mqa"]),
        (["m.experts.0.w1", "m.experts.10.w2", "m.gate"], ["m.experts", "m.gate"]),
        (["m.shared_experts.gate_proj", "m.shared_experts.up_proj"],
         ["m.shared_experts.gate_up_proj"]),
    ],
)  # fmt: skip
def test_layers_as_engines_build_them(names: list[str], built: list[str]) -> None:
    found = layers(names)
    assert list(found) == built
    assert sorted(module for parts in found.values() for module in parts) == sorted(names)


schemes = st.one_of(
    st.just(KEPT),
    st.builds(Scheme, st.integers(2, 8), st.sampled_from([-1, 16, 32, 64, 128]), st.booleans()),
)
FORMATS = sorted({f for row in READERS if not row.why for f in row.formats} | {"auto_round"})


@settings(max_examples=100)
@given(data=st.data(), engine=st.sampled_from(ENGINES), format=st.sampled_from(FORMATS))
def test_remedies_leave_nothing_to_refuse(data: st.DataObject, engine: str, format: str) -> None:
    hidden, inner = (32 * data.draw(st.integers(1, 12)) for _ in range(2))
    sizes = {512: hidden, 1024: inner, 256: inner, 128: 32}
    shapes = {name: (sizes[n], sizes[k]) for name, (n, k) in MOE.items()}
    model = {name: data.draw(schemes) for name in shapes}
    found = violations(engine, format, model, shapes)
    fixed = _apply(model, found)
    assert violations(engine, format, fixed, shapes) == []
    for violation in found:
        assert violation.remedy is not None
        for name, scheme in violation.remedy.items():
            assert scheme.bits >= model[name].bits


def _vllm_auto_round(own: dict[str, Any], name: str, parts: tuple[str, ...]) -> Fields:
    """Exact names; then parts, if one is named; all experts are asked for by one name."""
    extra, plain = own.get("extra_config", {}), _fields(own)
    if name in extra:
        return plain | _fields(extra[name])
    if ".experts" not in name and any(part in extra for part in parts):
        rows = [plain | _fields(extra.get(part, {})) for part in parts]
        assert all(row == rows[0] for row in rows)
        return rows[0]
    return plain


def _sglang_auto_round(own: dict[str, Any], name: str, parts: tuple[str, ...]) -> Fields:
    """Exact names; then whatever starts so for experts; then parts."""
    extra, plain = own.get("extra_config", {}), _fields(own)
    if name in extra:
        return plain | _fields(extra[name])
    below = [key for key in extra if key.startswith(name)] if name.endswith(".experts") else parts
    rows = [plain | _fields(extra.get(key, {})) for key in below] or [plain]
    assert all(row == rows[0] for row in rows)
    return rows[0]


def _gptq(own: dict[str, Any], name: str, parts: tuple[str, ...]) -> Fields:
    """``dynamic`` is matched with the name of the layer as it is built, in both."""
    for pattern, row in own.get("dynamic", {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return {"bits": 16} if pattern.startswith("-:") else _fields(own) | _fields(row)
    return _fields(own)


def _awq(fused: bool) -> Callable[[dict[str, Any], str, tuple[str, ...]], Fields]:
    """Kept names are looked for in the layer's; vLLM asks for its parts too, and all must agree."""

    def look(own: dict[str, Any], name: str, parts: tuple[str, ...]) -> Fields:
        kept = own["modules_to_not_convert"]
        hit = any(skip in name for skip in kept)
        if fused and not hit and ".experts" not in name:
            hits = {any(skip in part for skip in kept) for part in parts}
            assert len(hits) == 1
            hit = hits.pop()
        return {"bits": 16} if hit else {k: own[k] for k in ("bits", "group_size")}

    return look


def _compressed(class_first: bool) -> Callable[[dict[str, Any], str, tuple[str, ...]], Fields]:
    """``ignore`` by all parts or none; then the layer's name, its parts and its class, in order."""

    def look(own: dict[str, Any], name: str, parts: tuple[str, ...]) -> Fields:
        hits = {part in own["ignore"] for part in parts}
        assert len(hits) == 1
        if hits.pop():
            return {"bits": 16}
        groups = own["config_groups"].values()
        by_parts = [g for g in groups if all(part in g["targets"] for part in parts)]
        by_class = [g for g in groups if "Linear" in g["targets"]]
        (weights, *_) = [
            g["weights"] for g in (by_class + by_parts if class_first else by_parts + by_class)
        ]
        size = weights["group_size"] or -1
        return {"bits": weights["num_bits"], "group_size": size, "sym": weights["symmetric"]}

    return look


def _fields(row: Mapping[str, Any]) -> Fields:
    return {key: row[key] for key in ("bits", "group_size", "sym") if key in row}


#: What an engine makes of a format's config, re-told from its source in a few lines.
ORACLES = {
    ("vllm", "auto_round"): _vllm_auto_round, ("sglang", "auto_round"): _sglang_auto_round,
    ("vllm", "auto_gptq"): _gptq, ("sglang", "auto_gptq"): _gptq,
    ("vllm", "auto_awq"): _awq(True), ("sglang", "auto_awq"): _awq(False),
    ("vllm", "llm_compressor"): _compressed(False),
    ("sglang", "llm_compressor"): _compressed(True),
}  # fmt: skip


OTHERS = {"kept": KEPT, "w8": W8, "g32": Scheme(4, 32)}
FOUND = [
    (engine, format, other)
    for engine, format in ORACLES
    for other in OTHERS
    if format != "auto_awq" or other == "kept"  # it holds one scheme
]


@pytest.mark.parametrize(("engine", "format", "other"), FOUND)
def test_engines_find_every_layer_in_our_configs(engine: str, format: str, other: str) -> None:
    experts = {name.replace(".2.", ".3."): shape for name, shape in EXPERTS.items()}
    shapes = MOE | experts
    changed = [f"layers_0_self_attn_{x}_proj" for x in "qkv"]
    changed += [f"layers_1_mlp_{x}_proj" for x in ("gate", "up", "down")]
    changed += [name.replace(".", "_") for name in experts]
    schemes = _model(shapes, **dict.fromkeys(changed, OTHERS[other]))
    assert violations(engine, format, schemes, shapes) == []
    tensors = {
        f"{name}.weight": Stored(f"{name}.weight", "F16", s, 0) for name, s in shapes.items()
    }
    modules = {
        f"{name}.weight": Module(name, f"{name}.weight", scheme.spec, shapes[name], least_zero=1)
        for name, scheme in schemes.items()
        if scheme.spec is not None
    }
    contents = Contents(Path(), {}, tensors, modules, schemes, W4, "model.layers")
    row = ROWS[format]
    own = row.config(contents, row.packings[0])["quantization_config"]
    for name, parts in layers(shapes).items():
        scheme = schemes[parts[0]]
        found = ORACLES[engine, format](json.loads(json.dumps(own)), name, parts)
        assert found["bits"] == scheme.bits, (name, found)
        if scheme.bits != KEEP_BITS:
            assert found["group_size"] == scheme.group_size, name
            assert found.get("sym", scheme.sym) == scheme.sym, name
