# SPDX-License-Identifier: Apache-2.0
"""The calibration loader: packing by hand-made oracles, every source, every refusal."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from autoround.calib import load_tokens
from autoround.calib.packing import Packer
from autoround.errors import InputError

BOS, EOS, WORDS = 0, 1, 400
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role') }}"
    "{% endif %}<bos> {{ m['role'] }} {{ m['content'] }} {% endfor %}"
)
ROLE_IDS = {"system": 3, "user": 4, "assistant": 5}
FIRST = 6  # the id of the word "w0"


def make_tokenizer(bos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """One id per word: "w0" is 6, "w1" is 7, ...; optionally a BOS before every text."""
    words = ["<bos>", "<eos>", "<unk>", *ROLE_IDS, *(f"w{n}" for n in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token: can read any text, knows no special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = make_tokenizer()
CHATTY = make_tokenizer(bos=False, template=TEMPLATE)


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def ids(*numbers: int) -> list[int]:
    return [FIRST + n for n in numbers]


def load(dataset: Any, tokenizer: Any = TOKENIZER, n: int = 1, length: int = 4, seed: int = 0):
    return load_tokens(dataset, tokenizer, nsamples=n, seqlen=length, seed=seed)


# --- packing ------------------------------------------------------------------------------------


def test_a_long_document_gives_its_first_window() -> None:
    assert load([words(*range(10))]).ids.tolist() == [[BOS, *ids(0, 1, 2)]]


def test_short_documents_are_joined_with_eos_and_cut() -> None:
    # A stream has one reading order, so the rows are known up to the final shuffle.
    rows = load(iter([words(0), words(1, 2), words(3)]), n=2, length=5).ids.tolist()
    joined = [BOS, *ids(0), EOS, BOS, *ids(1), *ids(2), EOS, BOS, *ids(3), EOS]
    assert sorted(rows) == sorted([joined[:5], joined[5:10]])


def test_ends_of_long_documents_are_used_when_rows_are_missing() -> None:
    rows = load([words(*range(11))], n=3).ids.tolist()
    stream = [BOS, *ids(*range(11))]
    assert sorted(rows) == [stream[0:4], stream[4:8], stream[8:12]]


def test_concat_joins_long_documents_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": words(*range(k, k + 5))}) for k in (0, 10)))
    rows = load(f"{path}:concat", n=3).ids
    assert Counter(rows.flatten().tolist())[EOS] >= 1
    whole = load(str(path), n=2).ids.tolist()
    assert sorted(whole) == [[BOS, *ids(0, 1, 2)], [BOS, *ids(10, 11, 12)]]


def test_token_ids_are_joined_as_they_are() -> None:
    rows = load(iter([[11, 12, 13], [14, 15, 16, 17, 18]]), n=2).ids.tolist()
    assert rows in ([[14, 15, 16, 17], [11, 12, 13, 18]], [[11, 12, 13, 18], [14, 15, 16, 17]])


def test_a_tokenizer_without_bos_and_eos_adds_nothing() -> None:
    bare = make_tokenizer(bos=False)
    bare.eos_token = None
    rows = load(iter([words(0, 1, 2), words(3)]), bare).ids.tolist()
    assert rows == [ids(0, 1, 2, 3)]


def test_rows_of_one_repeated_token_are_dropped_and_counted() -> None:
    good, half, junk = [1, 2, 3, 4], [7, 7, 8, 9], [7, 7, 7, 9]
    found = load(iter([junk, half, good]), n=2)
    assert sorted(found.ids.tolist()) == [good, half]
    assert "1 dropped as one repeated token" in found.description


_documents = st.lists(st.lists(st.integers(2, 10_000), max_size=30), max_size=12)


@given(_documents, st.integers(2, 9), st.booleans(), st.none() | st.just(1))
def test_packing_loses_no_token(docs, seqlen: int, concat: bool, eos: int | None) -> None:
    packer = Packer(seqlen, concat)
    for doc in docs:
        packer.add(doc, eos)
    packer.use_spare(10**9)
    assert all(len(row) == seqlen for row in packer.rows)
    held = (len(packer.rows) + packer.dropped) * seqlen + packer.leftover
    assert held == packer.tokens
    assert packer.leftover < seqlen
    given_ids = Counter(token for doc in docs for token in doc)
    kept = Counter(token for row in packer.rows for token in row if token != 1)
    assert kept <= given_ids
    if not packer.dropped:
        assert (given_ids - kept).total() <= packer.leftover


# --- results ------------------------------------------------------------------------------------


def test_same_arguments_same_ids_and_the_seed_matters() -> None:
    texts = [words(*range(k, k + 6)) for k in range(300)]
    one, two, other = load(texts, n=20), load(texts, n=20), load(texts, n=20, seed=1)
    assert torch.equal(one.ids, two.ids)
    assert one.digest == two.digest
    assert one.digest != other.digest
    assert one.ids.dtype == torch.int64
    assert one.ids.shape == (20, 4)


def test_digest_is_the_sha256_of_shape_and_little_endian_ids() -> None:
    content = b"(1, 4)int64" + struct.pack("<4q", 5, 6, 7, 8)
    assert load([[5, 6, 7, 8]]).digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("spec", [None, "default", "bundled"])
def test_the_bundled_text_is_the_default(spec: str | None) -> None:
    found = load(spec, make_byte_tokenizer(), n=3, length=16)
    assert found.ids.shape == (3, 16)
    assert found.description.startswith("3 x 16 tokens from bundled text (sha256 ")


def test_few_bundled_samples_already_come_from_many_sources() -> None:
    from autoround.calib import pack
    from autoround.calib.data import _bundled_rows

    source_of = {row.text: row.source for row in pack.rows("calibration")}
    for seed in range(3):
        first = [text for text, _ in zip(_bundled_rows(seed), range(32), strict=False)]
        assert len({source_of[text] for text in first}) >= 12


def test_too_few_tokens_says_how_many_and_what_would_fit() -> None:
    texts = [words(*range(100))] * 2  # 2 x (BOS + 100), the ends closed by EOS: 204 tokens
    with pytest.raises(InputError) as caught:
        load(texts, n=4, length=64)
    assert str(caught.value) == (
        "dataset 'Python list' gives 3 samples of 64 tokens (204 tokens in 2 documents) and 4 were "
        "asked for: use --seqlen 32 or --nsamples 3, or a larger dataset"
    )
    assert load(texts, n=4, length=32).ids.shape == (4, 32)
    assert load(texts, n=3, length=64).ids.shape == (3, 64)


def test_a_tokenizer_that_does_not_know_the_text_is_suspected() -> None:
    with pytest.raises(InputError, match="check that this tokenizer fits this text"):
        load(["all of this is unknown"])


def test_nothing_at_all() -> None:
    with pytest.raises(InputError, match="gives 0 samples of 4 tokens"):
        load([])


@pytest.mark.parametrize(("n", "length"), [(0, 4), (1, 1)])
def test_senseless_sizes(n: int, length: int) -> None:
    with pytest.raises(InputError, match="at least 1 sample of 2 tokens"):
        load(None, n=n, length=length)


# --- sharing between datasets -------------------------------------------------------------------


def _file(path: Path, first: int, count: int) -> Path:
    """``count`` rows of 4 ids, each row holding ``first`` only once so that nothing is dropped."""
    rows = [[first, 2 * n + 1000, 2 * n + 1001, first + 1] for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _taken(found: Any) -> dict[int, int]:
    return dict(Counter(found.ids[:, 0].tolist()))


def test_num_is_exact_and_the_rest_is_shared_equally(tmp_path: Path) -> None:
    a, b, c = (_file(tmp_path / f"{k}.jsonl", k, 50) for k in (1, 2, 3))
    assert _taken(load(f"{a}:num=2, {b}, {c}", n=13)) == {1: 2, 2: 6, 3: 5}


def test_what_one_dataset_lacks_the_others_give(tmp_path: Path) -> None:
    a, b, c = (_file(tmp_path / f"{k}.jsonl", k, count) for k, count in ((1, 3), (2, 50), (3, 6)))
    assert _taken(load(f"{a},{b},{c}", n=30)) == {1: 3, 2: 21, 3: 6}


def test_num_that_cannot_add_up_is_refused_before_reading(tmp_path: Path) -> None:
    a, b = _file(tmp_path / "1.jsonl", 1, 5), tmp_path / "missing.jsonl"
    for spec, n in ((f"{a}:num=3", 4), (f"{a}:num=5,{b}", 5), (f"{a}:num=2,{b}:num=2", 5)):
        with pytest.raises(InputError, match=r"num= adds up to \d"):
            load(spec, n=n)


# --- row shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        words(0, 1, 2),
        {"text": words(0, 1, 2)},
        {"text": [words(0, 1, 2)], "meta": ["x"]},
        {"content": words(0, 1, 2)},
        {"prompt": "w0 w1", "completion": " w2"},
        {"prompt": ["w0 w1"], "completion": [" w2"]},
        {"input_ids": [BOS, *ids(0, 1, 2)], "labels": [1]},
        {"input_ids": [[BOS, *ids(0, 1, 2)]]},
        {
            "input_ids": torch.tensor([[9, 9, BOS, *ids(0, 1, 2)]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
        },
        {
            "input_ids": [BOS, *ids(0, 1, 2), 9],
            "attention_mask": [True, True, True, True, False],
        },
        [BOS, *ids(0, 1, 2)],
        torch.tensor([BOS, *ids(0, 1, 2)], dtype=torch.int32),
        torch.tensor([[BOS, *ids(0, 1, 2)]]).numpy(),
        (torch.tensor([[BOS, *ids(0, 1, 2)]]), torch.ones(1, 4)),
        (words(0, 1, 2),),
    ],
)
def test_every_row_shape_means_the_same(row: Any) -> None:
    assert load(iter([row])).ids.tolist() == [[BOS, *ids(0, 1, 2)]]


MESSAGES = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]
CHAT_IDS = [BOS, ROLE_IDS["user"], FIRST, BOS, ROLE_IDS["assistant"], FIRST + 1]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"messages": [MESSAGES]},
        MESSAGES,
        {"conversations": [{"from": "human", "value": "w0"}, {"from": "gpt", "value": "w1"}]},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    ],
)
def test_conversations_go_through_the_template_without_more_special_tokens(row: Any) -> None:
    assert load(iter([row]), CHATTY, length=6).ids.tolist() == [CHAT_IDS]


def test_a_system_prompt_comes_first_unless_the_row_has_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "w0"}))
    found = load(f"{path}:system_prompt='w7 w8'", CHATTY, length=6).ids.tolist()
    assert found == [[BOS, ROLE_IDS["system"], *ids(7, 8), BOS, ROLE_IDS["user"]]]
    own = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    path.write_text(json.dumps({"messages": own}))
    found = load(f"{path}:system_prompt=w7", CHATTY, length=6).ids.tolist()
    assert found == [[BOS, ROLE_IDS["system"], *ids(1), BOS, ROLE_IDS["user"], *ids(2)]]


def test_the_template_can_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}))
    found = load(f"{path}:apply_chat_template=false")
    assert found.ids.tolist() == [[BOS, *ids(0, 1), EOS]]


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        (5, "row 0 of Python list_iterator is of type int"),
        ({"a": 1, "b": 2}, "has the keys 'a', 'b'"),
        ({}, "has the keys none"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "another shape"),
        ({"input_ids": "abc"}, "input_ids of type str"),
        ([1, 2, "x"], "no token id"),
        ([1, -2], "no token id"),
        (torch.rand(4), "tensor of torch.float32"),
        ({"messages": "hello"}, "messages of type str"),
        ({"messages": [{"who": "x"}]}, "without 'role'"),
        ({"prompt": "w0", "completion": MESSAGES}, "different kinds"),
        ({"messages": MESSAGES}, "apply_chat_template=false"),
    ],
)
def test_unusable_rows_are_named(row: Any, fragment: str) -> None:
    with pytest.raises(InputError) as caught:
        load(iter([row]))
    assert fragment in str(caught.value)


def test_what_the_template_raises_names_the_row() -> None:
    with pytest.raises(InputError, match=r"row 0 of .* the chat template refused it: no role"):
        load(iter([{"messages": [{"role": "tool", "content": "w0"}]}]), CHATTY)


def test_text_needs_a_tokenizer_and_ids_do_not() -> None:
    with pytest.raises(InputError, match="there is no tokenizer"):
        load(["some text"], None)
    assert load([[5, 6, 7, 8]], None).ids.tolist() == [[5, 6, 7, 8]]
