# SPDX-License-Identifier: Apache-2.0
"""Scheme names, overrides, patterns, and which layer ends up with which scheme."""

from typing import Any

import pytest

from autoround.errors import InputError
from autoround.scheme import SCHEMES, Scheme, assign, override, pattern, scheme_by_name

LAYERS = [
    f"model.layers.{i}.{leaf}"
    for i in range(12)
    for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
]


def of(block: int) -> list[str]:
    return [name for name in LAYERS if name.split(".")[2] == str(block)]


def leaf(name: str) -> list[str]:
    return [layer for layer in LAYERS if layer.endswith(name)]


# ---- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [("W2A16", 2, 128), ("W3A16G64", 3, 64), ("W4A16", 4, 128), ("W4A16G32", 4, 32),
     ("W8A16", 8, 128), ("BF16", 16, 128)],
)  # fmt: skip
def test_table(name: str, bits: int, group: int) -> None:
    assert SCHEMES[name] == Scheme(bits, group, True)


@pytest.mark.parametrize("name", ["w4a16", "W4A16", "w4A16"])
def test_names_in_any_case(name: str) -> None:
    assert scheme_by_name(name) == Scheme(4, 128, True)


def test_unknown_name_shows_close_rows() -> None:
    with pytest.raises(InputError, match=r"unknown scheme 'W3A8'.*list schemes.*W3A16"):
        scheme_by_name("W3A8")
    with pytest.raises(InputError, match=r"unknown scheme 'int'.*W2A16"):
        scheme_by_name("int")


@pytest.mark.parametrize(
    ("scheme", "spec"),
    [(Scheme(4), "s4:g128:f16"), (Scheme(3, 32, False), "u3:g32:f16:int"),
     (Scheme(8, -1), "s8:g0:f16"), (Scheme(16), "None")],
)  # fmt: skip
def test_spec(scheme: Scheme, spec: str) -> None:
    assert str(scheme.spec) == spec


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"bits": 1}, "bits=1"), ({"bits": 9}, "2 to 8"), ({"bits": 32}, "16 to keep"),
     ({"bits": 4, "group_size": 8}, "group_size=8"), ({"bits": 4, "group_size": 0}, "-1"),
     ({"bits": 4, "group_size": -2}, "whole row")],
)  # fmt: skip
def test_illegal_values(fields: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Scheme(**fields)


# ---- overrides -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Scheme(4, 128, True)),
        ({"bits": 8}, Scheme(8, 128, True)),
        ({"group_size": -1}, Scheme(4, -1, True)),
        ({"sym": False, "group_size": 32}, Scheme(4, 32, False)),
        ({"bits": None, "group_size": None, "sym": None}, Scheme(4, 128, True)),
        ({"act_bits": 16, "data_type": "int"}, Scheme(4, 128, True)),
        ({"scheme": "W8A16G32", "sym": False}, Scheme(8, 32, False)),
        ("w2a16g64", Scheme(2, 64, True)),
        (Scheme(5, 64, False), Scheme(5, 64, False)),
    ],
)
def test_override(changes: Any, expected: Scheme) -> None:
    assert override(Scheme(4), changes, "here") == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bit": 8}, r"here: unknown field \['bit'\]; known: bits, group_size, sym"),
        ({"act_bits": 8}, "act_bits=8 is not supported"),
        ({"data_type": "mx_fp"}, "data_type='mx_fp' is not supported"),
        ({"scheme": "nope"}, "unknown scheme 'nope'"),
    ],
)
def test_refused_override(changes: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        override(Scheme(4), changes, "here")


# ---- patterns --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.layers.3.mlp.up_proj", ["model.layers.3.mlp.up_proj"]),
        ("model.layers.1", of(1)),
        ("layers.1", of(1)),
        ("layers.1.", of(1)),
        ("1.mlp", [f"model.layers.1.mlp.{x}_proj" for x in ("up", "down")]),
        ("down_proj", leaf("down_proj")),
        ("self_attn", [n for n in LAYERS if "self_attn" in n]),
        (r"layers\.(0|11)\..*up_proj$", [of(0)[2], of(11)[2]]),
        (".*k_proj.*", leaf("k_proj")),
        ("*.k_proj", leaf("k_proj")),
        ("*k_proj", leaf("k_proj")),
        ("*.mlp", [n for n in LAYERS if ".mlp." in n]),
        ("model.layers.1*.mlp.up_proj", [of(b)[2] for b in (1, 10, 11)]),
        ("model.layers.*.mlp.up_proj", leaf("up_proj")),
        (r"layers\.1", of(1) + of(10) + of(11)),
        ("model", LAYERS),
    ],
)
def test_pattern(key: str, expected: list[str]) -> None:
    assert pattern(key, LAYERS) == expected


def test_exact_name_is_not_a_substring() -> None:
    assert pattern("a.b", ["a.b", "x.a.b", "a.bc"]) == ["a.b"]


def test_dot_of_a_plain_key_is_a_dot() -> None:
    with pytest.raises(InputError, match="matches no layer"):
        pattern("up.proj", LAYERS)


@pytest.mark.parametrize("key", ["o_proj", "layers.12", r"layers\.12\.", "*.q_pro", "layers*"])
def test_pattern_that_matches_nothing(key: str) -> None:
    with pytest.raises(InputError) as error:
        pattern(key, LAYERS)
    assert repr(key) in str(error.value)
    assert LAYERS[0] in str(error.value)


@pytest.mark.parametrize("key", ["layers.(", "*q_proj$", "[a"])
def test_bad_regular_expression(key: str) -> None:
    with pytest.raises(InputError, match="is not a regular expression"):
        pattern(key, LAYERS)


# ---- assignment ------------------------------------------------------------------------------


def test_everything_has_the_base_scheme() -> None:
    assert assign(LAYERS, Scheme(4), {}, []) == dict.fromkeys(LAYERS, Scheme(4))


def test_exact_beats_pattern_in_either_order() -> None:
    exact = {LAYERS[2]: {"bits": 3}}
    broad = {"up_proj": {"bits": 8}}
    for given in (exact | broad, broad | exact):
        table = assign(LAYERS, Scheme(4), given, [])
        assert table[LAYERS[2]].bits == 3
        assert [n for n, s in table.items() if s.bits == 8] == leaf("up_proj")[1:]
        assert {s.bits for n, s in table.items() if "up_proj" not in n} == {4}


def test_later_pattern_wins_and_starts_from_the_base() -> None:
    table = assign(LAYERS, Scheme(4), {"mlp": {"group_size": 32}, "up_proj": {"bits": 8}}, [])
    assert table[LAYERS[2]] == Scheme(8, 128)
    assert table[LAYERS[3]] == Scheme(4, 32)


def test_ignored_layers_are_kept_unless_named_exactly() -> None:
    table = assign(LAYERS, Scheme(4), {LAYERS[2]: "W8A16", "k_proj": "W8A16"}, ["mlp", "k_proj"])
    kept = {n for n, s in table.items() if s.bits == 16}
    assert kept == {n for n in LAYERS if "mlp" in n or "k_proj" in n} - {LAYERS[2]}
    assert table[LAYERS[2]].bits == 8


def test_unmatched_keys_of_both_kinds_are_refused() -> None:
    for given, ignored in (({"nope": {"bits": 8}}, []), ({}, ["nope"])):
        with pytest.raises(InputError, match="'nope' matches no layer"):
            assign(LAYERS, Scheme(4), given, ignored)


def test_errors_name_the_key() -> None:
    with pytest.raises(InputError, match=r"layer_config\['mlp'\]: unknown field"):
        assign(LAYERS, Scheme(4), {"mlp": {"bts": 8}}, [])
