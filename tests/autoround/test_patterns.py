# SPDX-License-Identifier: Apache-2.0
"""Expressions out of files against Python's `re`, and those that `re` would not come back from."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoround.errors import InputError
from autoround.patterns import LONGEST, Pattern

NAMES = [
    "lm_head",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.mlp.experts.3.gate_proj",
    "model.layers.2.mlp.gate",
]
#: As the configs of other programs have them.
WRITTEN = [
    r".*mlp\.gate.*",
    r"model\.layers\.[0-5]\..*",
    r"^(?!.*(?:lm_head|gate$)).*$",
    r".*\.experts\.\d+\.(gate|up|down)_proj",
    r"(?i)MODEL\.LAYERS\.(?:1|2)\.",
    r"(\w+\.){2}10\b",
    r"(?<=layers\.)1(?!\d)",
    r"[^.]+$",
    "layers.1",
]
CHARS = ["a", "b", "A", ".", r"\.", "_", "1", "\n", "[ab]", "[^a]", "[a-c1]", r"[^\d_]"]
KINDS = [r"\d", r"\D", r"\w", r"\W", r"\s", r"\b", r"\B", "^", "$", r"\A", r"\Z"]
GROUPS = ["(?:", "(", "(?=", "(?!", "(?<=", "(?<!", "(?i:", "|", ")"]
REPEATS = ["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,3}", "{2,}"]


@pytest.mark.parametrize("source", WRITTEN)
def test_written_patterns(source: str) -> None:
    ours, theirs = Pattern(source), re.compile(source)
    for name in NAMES:
        assert ours.match(name) == bool(theirs.match(name))
        assert ours.search(name) == bool(theirs.search(name))


@given(
    st.lists(st.sampled_from([*CHARS, *KINDS, *GROUPS, *REPEATS]), min_size=1, max_size=9),
    st.lists(st.text("abA1_. \n", min_size=1, max_size=8), min_size=1, max_size=4),
)
def test_any_pattern(pieces: list[str], texts: list[str]) -> None:
    """Small ones, which `re` is done with at once. (An empty text has a border for `\\B` or none,
    by Python's version.)"""
    source = "".join(pieces)
    source += ")" * (source.count("(") - source.count(")"))
    assume(not re.search(r"[*+?}]\+", source))  # possessive: refused
    try:
        theirs = re.compile(source)
    except re.error:
        with pytest.raises(InputError, match="is not a regular expression"):
            Pattern(source)
        return
    for text in texts:
        assert Pattern(source).match(text) == bool(theirs.match(text)), text
        assert Pattern(source).search(text) == bool(theirs.search(text)), text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("(a+)+$", "a" * 1000 + "b"),
        ("(?:a|a)*b", "a" * 1000),
        (".*" * 12 + "x", "a" * 1000),
        ("(?:(?:(?:a{0,9999}){0,9999}){0,9999})b", "a" * 1000),
        ("(?:(?:a{1000}){1000}){1000}", "a" * 1000),
        ("(?:(?:(?:ab?)*c?)*d?)*e", "ab" * 500),
        ("(?:" * 60 + "[ab]" + ")*" * 60 + "c", "ab" * 500),
    ],
)
def test_what_backtracking_does_not_end_with(source: str, text: str) -> None:
    assert not Pattern(source).search(text)
    assert Pattern(source).search(text) == Pattern(f"(?:{source})|!").search(text)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("(", "is not a regular expression"),
        ("a{99999999999999999999}", "is not a regular expression"),
        ("(?<=a+)b", "look-behind requires a fixed width"),
        (r"(.)\1", "a back reference"),
        ("(?>a)b", "an atomic group"),
        ("a++b", "a possessive repeat"),
        ("(?a)\\w", "has a flag"),
        ("(" * 4000 + ")" * 4000, "is nested too deeply"),
        ("a" * (LONGEST + 1), f"more than {LONGEST}"),
        ("(?:(?!" + "(?:" * 9 + "[ab]c?" + ")*" * 9 + "d)[ab])*", "takes too many steps"),
    ],
)
def test_refused(source: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as said:
        Pattern(source).search("ab" * 500)
    assert str(said.value).startswith("the pattern '")
