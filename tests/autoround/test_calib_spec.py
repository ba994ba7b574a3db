# SPDX-License-Identifier: Apache-2.0
"""The dataset language: exact readings, the bugs of its model that must stay fixed, fuzz."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoround.calib.spec import DatasetItem, parse_dataset
from autoround.errors import InputError

READINGS = [
    ("pile-10k", [DatasetItem("pile-10k")]),
    ("NeelNanda/pile-10k", [DatasetItem("NeelNanda/pile-10k")]),
    (" a.jsonl , b.txt ", [DatasetItem("a.jsonl"), DatasetItem("b.txt")]),
    ("a:num=5", [DatasetItem("a", num=5)]),
    ("a:num=5:concat", [DatasetItem("a", num=5, concat=True)]),
    ("a:concat=false", [DatasetItem("a")]),
    ("a:concat=True", [DatasetItem("a", concat=True)]),
    ("mbpp:split=train+test", [DatasetItem("mbpp", split=("train", "test"))]),
    ("a:apply_chat_template", [DatasetItem("a", chat=True)]),
    ("a:apply_chat_template=false", [DatasetItem("a", chat=False)]),
    ("my file.txt:num=3", [DatasetItem("my file.txt", num=3)]),
    ("'odd,name:1.txt'", [DatasetItem("odd,name:1.txt")]),
    ("a=b.txt", [DatasetItem("a=b.txt")]),
    ("a:system_prompt=Don't panic", [DatasetItem("a", chat=True, system_prompt="Don't panic")]),
    (
        'a:system_prompt="Be brief, and kind: \\"always\\" = \\\\o/":num=2,b',
        [
            DatasetItem("a", 2, chat=True, system_prompt='Be brief, and kind: "always" = \\o/'),
            DatasetItem("b"),
        ],
    ),
    ("a:system_prompt='  kept  '", [DatasetItem("a", chat=True, system_prompt="  kept  ")]),
]


@pytest.mark.parametrize(("spec", "items"), READINGS)
def test_reading(spec: str, items: list[DatasetItem]) -> None:
    assert parse_dataset(spec) == items


def test_a_system_prompt_stays_with_its_item_and_keeps_its_spaces() -> None:
    first, second = parse_dataset("a:system_prompt=You are a poet,b:apply_chat_template")
    assert first.system_prompt == "You are a poet"
    assert second.system_prompt is None


@pytest.mark.parametrize(
    ("spec", "fragment"),
    [
        ("", "without a name"),
        ("a,,b", "without a name"),
        ("a,", "without a name"),
        (":num=3", "without a name"),
        ("a:", "use one of apply_chat_template, concat, num, split, system_prompt"),
        ("a:sedd=3", "'sedd'"),
        ("a:num", "num=128"),
        ("a:num=0", "num=128"),
        ("a:num=-4", "num=128"),
        ("a:num=4.5", "num=128"),
        ("a:num=³", "num=128"),
        ("a:num=1:num=2", "given twice"),
        ("a:split=", "split=train+test"),
        ("a:split=x++y", "split=train+test"),
        ("a:concat=maybe", "true or false"),
        ("a:system_prompt=", "needs text"),
        ("a:system_prompt=x:apply_chat_template=false", "needs the chat template"),
        ("a:system_prompt='x", "character 16 is never closed"),
        ("a:system_prompt='x'y", "closing quote"),
        ("'a", "character 0 is never closed"),
    ],
)
def test_errors_are_one_line_and_say_what_to_do(spec: str, fragment: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_dataset(spec)
    message = str(caught.value)
    assert fragment in message
    assert "\n" not in message


@given(st.text(alphabet="ab ,:=+\"'\\num1spltconca\n\t", max_size=40))
def test_any_text_is_read_or_refused(spec: str) -> None:
    try:
        items = parse_dataset(spec)
    except InputError:
        return
    assert parse_dataset(",".join(map(str, items))) == items


_split_names = st.text(alphabet="abcxyz[]:%, 0123", min_size=1, max_size=6).filter(
    lambda s: s == s.strip()
)
_items = st.builds(
    DatasetItem,
    name=st.text(min_size=1, max_size=20),
    num=st.none() | st.integers(1, 999_999_999),
    split=st.lists(_split_names, max_size=3).map(tuple),
    concat=st.booleans(),
    chat=st.none() | st.booleans(),
)
_prompted = st.builds(
    DatasetItem, name=st.just("x"), chat=st.just(True), system_prompt=st.text(min_size=1)
)


@given(st.lists(_items | _prompted, min_size=1, max_size=4))
def test_written_items_are_read_back(items: list[DatasetItem]) -> None:
    assert parse_dataset(",".join(map(str, items))) == items
