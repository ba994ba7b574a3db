# SPDX-License-Identifier: Apache-2.0
"""File layouts against a packer that writes one bit at a time, and against words seen in files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hal
from hal import Spec
from hal.layout import LAYOUTS, pack_awq, pack_stream, unpack_awq, unpack_stream
from hal.testing import quantized, weights


def bit_by_bit(values: list[int], bits: int) -> list[int]:
    """Unsigned 32-bit words of the stream, least significant bit first."""
    stream = [value >> i & 1 for value in values for i in range(bits)]
    return [
        sum(bit << i for i, bit in enumerate(stream[at : at + 32]))
        for at in range(0, len(stream), 32)
    ]


def unsigned(words: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.flatten().tolist()]


@given(
    bits=st.integers(2, 8), rows=st.integers(1, 3), blocks=st.integers(1, 3), seed=st.integers(0)
)
@settings(max_examples=40)
def test_stream_is_the_bit_stream(bits: int, rows: int, blocks: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed % 2**32)
    values = torch.randint(1 << bits, (rows, blocks * 32), generator=rng).to(torch.uint8)
    words = pack_stream(values, bits)
    assert [unsigned(row) for row in words] == [bit_by_bit(row, bits) for row in values.tolist()]
    assert torch.equal(unpack_stream(words, bits), values)


@pytest.mark.parametrize(
    ("bits", "zero", "words"),
    [
        (4, 7, [0x77777777]),  # 4-bit symmetric zero points, stored minus one (formats.md 1.1)
        (4, 8, [0x88888888]),
        (3, 3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (8, 127, [0x7F7F7F7F]),
    ],
)
def test_words_seen_in_files(bits: int, zero: int, words: list[int]) -> None:
    packed = pack_stream(torch.full((1, 32), zero, dtype=torch.uint8), bits)
    assert unsigned(packed)[: len(words)] == words


def test_awq_order() -> None:
    values = torch.arange(8, dtype=torch.uint8)[None]
    assert unsigned(pack_awq(values)) == [0x75316420]  # nibbles 0 2 4 6 1 3 5 7, lowest first
    assert torch.equal(unpack_awq(pack_awq(values)), values)


@given(
    bits=st.integers(2, 8),
    asymmetric=st.booleans(),
    layout=st.sampled_from([name for name in LAYOUTS if name != "plain"]),
    n=st.integers(1, 3),
    k=st.integers(1, 6),
    group=st.sampled_from([0, 16, 32, 128]),
)
@settings(max_examples=60)
def test_pack_and_back(
    bits: int, asymmetric: bool, layout: str, n: int, k: int, group: int
) -> None:
    n, k = 32 * n, 32 * k
    elem, zero = (f"u{bits}", "int") if asymmetric else (f"s{bits}", "")
    spec = hal.Spec(elem, group, "f16", zero)  # type: ignore[arg-type]
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(bits))
    q = hal.quantize(w, hal.search(w, spec), spec)
    if LAYOUTS[layout].fits(spec, n, k):
        with pytest.raises(hal.Unsupported, match=layout):
            hal.pack(q, layout)
        return
    packed = hal.pack(q, layout)
    assert {name: tuple(t.shape) for name, t in packed.parts.items()} == {
        name: part.shape for name, part in hal.describe(spec, (n, k), layout).items()
    }
    back = hal.pack(packed, "plain")
    assert all(torch.equal(back.parts[name], q.parts[name]) for name in q.parts)


def test_gptq_column_is_the_stream_along_k() -> None:
    spec = hal.Spec("u3", 32, zero="int")
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    q = hal.quantize(w, hal.search(w, spec), spec)
    packed = hal.pack(q, "gptq_raw").parts
    for n in (0, 31):
        assert unsigned(packed["qweight"][:, n]) == bit_by_bit(q.parts["codes"][n].tolist(), 3)
    for g in range(2):
        assert unsigned(packed["qzeros"][g]) == bit_by_bit(q.parts["zero"][:, g].tolist(), 3)
    assert torch.equal(packed["scales"], q.parts["scale"].t())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", ["s4:g32:f16", "u4:g64:f16:int", "s3:g128:f16", "u2:g0:f16:int"])
def test_what_is_described_is_what_is_packed(spec: str, layout: str) -> None:
    parsed = Spec.parse(spec)
    if not hal.refuse(parsed, (64, 256), layout):
        packed = hal.pack(quantized(weights(64, 256, 1), parsed), layout).parts
        described = hal.describe(parsed, (64, 256), layout)
        assert {k: (t.dtype, tuple(t.shape)) for k, t in packed.items()} == {
            k: (p.dtype, p.shape) for k, p in described.items()
        }
        assert [*packed] == [*described]
