# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoint directories, and refusing broken ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from autoround.checkpoint import Checkpoint, companions, resolve
from autoround.errors import InputError
from autoround.header import read_header
from autoround.models import StreamedModel


def test_checkpoint_reads(saved: Callable[..., Path]) -> None:
    path = saved("llama")
    checkpoint = Checkpoint(str(path))
    raw = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    assert set(checkpoint.entries) == set(raw)
    assert checkpoint.total_bytes == sum(t.nbytes for t in raw.values())
    assert checkpoint.config["model_type"] == "llama"
    for name, tensor in raw.items():
        entry = checkpoint.entries[name]
        assert (entry.dtype, entry.shape, entry.nbytes) == (
            "F32",
            tuple(tensor.shape),
            tensor.nbytes,
        )
        assert torch.equal(checkpoint.get(name), tensor)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(checkpoint.get(name, slice(5, 9)), raw[name][5:9])
    checkpoint.get(name).zero_()
    assert torch.equal(checkpoint.get(name), raw[name])


def test_tensors_at_odd_places(tmp_path: Path) -> None:
    """A header of any length is legal, so elements need not lie at multiples of their size."""
    values = torch.randn(7, 3)
    for pad in range(1, 8):
        row = {"dtype": "F32", "shape": [7, 3], "data_offsets": [0, 84]}
        head = json.dumps({"w": row}).encode()
        head += b" " * (-len(head) % 8 + pad)
        raw = len(head).to_bytes(8, "little") + head + values.numpy().tobytes()
        (tmp_path / "model.safetensors").write_bytes(raw)
        (tmp_path / "config.json").write_text("{}")
        checkpoint = Checkpoint(tmp_path)
        assert torch.equal(checkpoint.get("w"), values)
        assert torch.equal(checkpoint.get("w", slice(2, 5)) + 1, values[2:5] + 1)
        checkpoint.get("w").zero_()
        assert torch.equal(checkpoint.get("w"), values)


def test_companions_travel(llama: Path) -> None:
    files = [
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "chat_template.jinja",
        "modeling_x.py",
    ]
    for name in [*files, "README.md", "pytorch_model.bin", "tokenizer.bin", ".hidden/x.py"]:
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_text("x")
    found = [str(file) for file in companions(llama)]
    assert found == sorted([*files, "generation_config.json"])


def test_shards_without_an_index(llama: Path) -> None:
    names = set(Checkpoint(llama).entries)
    (llama / "model.safetensors.index.json").unlink()
    assert set(Checkpoint(llama).entries) == names
    sorted(llama.glob("*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match=r"has \d of \d shards and no .*; download it again"):
        Checkpoint(llama)


def rewrite(shard: Path, field: str, change: Callable[[Any], Any]) -> None:
    """Change one field of the last tensor's header row."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    row = head[[name for name in head if name != "__metadata__"][-1]]
    row[field] = change(row[field])
    text = json.dumps(head).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def reindex(shard: Path, **names: str) -> None:
    """Add names to the index beside a shard."""
    index = shard.parent / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] |= names
    index.write_text(json.dumps(table))


def duplicate(shard: Path) -> None:
    save_file(load_file(shard) | {"extra": torch.ones(1)}, shard.parent / "again.safetensors")
    reindex(shard, extra="again.safetensors")


def cut(shard: Path, size: int | None) -> None:
    shard.write_bytes(shard.read_bytes()[:size])


def index(shard: Path, text: str) -> None:
    (shard.parent / "model.safetensors.index.json").write_text(text)


# what happened -> (how, what the message says)
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda s: cut(s, -100), "truncated"),
    "truncated header": (lambda s: cut(s, 50), "truncated or corrupt"),
    "empty": (lambda s: cut(s, 0), "has 0 bytes"),
    "overlong": (lambda s: s.write_bytes(s.read_bytes() + b"more"), "overlong"),
    "corrupt": (lambda s: s.write_bytes(s.read_bytes().replace(b"{", b"x")), "not JSON"),
    "html": (lambda s: s.write_bytes(b"<!DOCTYPE html>rate limited"), "corrupt"),
    "missing shard": (lambda s: s.unlink(), "is missing"),
    "bad index": (lambda s: index(s, "{"), "not readable JSON"),
    "no weight map": (lambda s: index(s, "{}"), "no weight_map"),
    "escape": (lambda s: index(s, '{"weight_map": {"a": "../a.safetensors"}}'), "outside"),
    "ghost": (lambda s: reindex(s, **{"model.ghost": s.name}), "model.ghost"),
    "twice": (duplicate, "is in both"),
    "overlap": (lambda s: rewrite(s, "data_offsets", lambda o: [o[0] - 4, o[1] - 4]), "overlap"),
    "negative": (lambda s: rewrite(s, "data_offsets", lambda _: [-4, 0]), "header row"),
    "wrong size": (lambda s: rewrite(s, "shape", lambda _: [3, 3]), "header row"),
    "wrong dtype": (lambda s: rewrite(s, "dtype", lambda _: "F99"), "header row"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_broken_checkpoints(kind: str, llama: Path) -> None:
    how, says = DAMAGE[kind]
    how(min(llama.glob("*.safetensors")))
    with pytest.raises(InputError) as caught:
        Checkpoint(llama)
    message = str(caught.value)
    assert says in message
    assert message.endswith("download it again")
    assert "\n" not in message
    assert "safetensors" in message


def test_not_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no config\.json"):
        Checkpoint(tmp_path)
    for file in llama.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(InputError, match=r"holds no \*\.safetensors"):
        Checkpoint(llama)
    (llama / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model\.bin\).*convert"):
        Checkpoint(llama)
    (llama / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        Checkpoint(llama)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def test_config_and_weights_must_agree(llama: Path) -> None:
    edit_config(llama, intermediate_size=80)
    with pytest.raises(InputError, match=r"wants shape \(64, 80\), but .* has \(64, 96\)"):
        StreamedModel(Checkpoint(llama))
    edit_config(llama, intermediate_size=96, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"lacks model\.layers\.3\.input_layernorm\.weight and 8"):
        StreamedModel(Checkpoint(llama))
    edit_config(llama, num_hidden_layers=3, model_type="no_such_model")
    with pytest.raises(InputError, match="cannot read its config"):
        StreamedModel(Checkpoint(llama))
    edit_config(llama, model_type="llama", quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match=r"already quantized \(gptq\)"):
        Checkpoint(llama)


def test_missing_experts_are_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "moe"
    zoo.save("mixtral", path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        StreamedModel(Checkpoint(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scan_finds_weights_that_are_no_numbers(value: float, llama: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    shard = Checkpoint(llama).entries[name].file
    tensors = load_file(shard)
    tensors[name][3, 4:6] = value
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(
        InputError, match=rf"{name} in .* holds 2 NaN or infinite weights; download"
    ):
        Checkpoint(llama).scan_finite()
    Checkpoint(llama).scan_finite(["lm_head.weight"])


def test_resolve(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(llama)) == llama.resolve()
    with pytest.raises(InputError, match="is a file"):
        resolve(str(llama / "config.json"))
    with pytest.raises(InputError, match="does not exist"):
        resolve("/nowhere/at/all")

    def unreachable(model: str, **_: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        InputError, match=r"nor reachable on the hub \(no network\).*hf download a/b"
    ):
        resolve("a/b")


def test_headers_of_every_dtype(tmp_path: Path) -> None:
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
    tensors = {str(dtype): torch.zeros(3, 5).to(dtype) for dtype in dtypes}
    save_file(
        tensors | {"none": torch.zeros(0, 4), "one": torch.tensor(1.0)}, tmp_path / "x.safetensors"
    )
    found = read_header(tmp_path / "x.safetensors")
    assert {name: found[name].nbytes for name in tensors} == {
        n: t.nbytes for n, t in tensors.items()
    }
    assert (found["none"].nbytes, found["one"].shape) == (0, ())
