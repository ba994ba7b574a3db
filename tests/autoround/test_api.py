# SPDX-License-Identifier: Apache-2.0
"""`AutoRound`, the constructor users know, and the names of the package."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
import zoo

import autoround
from autoround import AutoRound, InputError, Recipe, Scheme
from hal import QExperts, QLinear

ROOT = Path(__file__).parents[2]
PGDOC = ROOT / "benchmarks/models/pgdoc"
ROWS = [list(range(3 + i, 19 + i)) for i in range(8)]
SMALL: dict[str, Any] = {"iters": 2, "nsamples": 8, "seqlen": 16, "batch_size": 4, "dataset": ROWS}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("llama", tmp_path_factory.mktemp("llama") / "llama")


def rtn(model: Any, **changes: Any) -> AutoRound:
    return AutoRound(model, iters=0, group_size=32, **changes)


def same_files(a: Path, b: Path) -> bool:
    names = [sorted(f.relative_to(path) for f in path.rglob("*") if f.is_file()) for path in (a, b)]
    return names[0] == names[1] and all(
        (a / n).read_bytes() == (b / n).read_bytes() for n in names[0]
    )


# ---- the constructor -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Recipe()),
        ({"scheme": "W3A16", "sym": False}, Recipe(scheme="W3A16", sym=False)),
        ({"scheme": Scheme(2, 64, False)}, Recipe(bits=2, group_size=64, sym=False)),
        ({"scheme": Scheme(2, 64), "bits": 3}, Recipe(bits=3, group_size=64, sym=True)),
        ({"recipe": "light", "nsamples": 4}, Recipe(nsamples=4)),
        ({"ignore_layers": "a, b"}, Recipe(ignore_layers=("a", "b"))),
        ({"ignore_layers": ["a"]}, Recipe(ignore_layers=("a",))),
        ({"layer_config": {"a": {"bits": 8}}}, Recipe(layer_config={"a": {"bits": 8}})),
        ({"enable_minmax_tuning": False}, Recipe(feedback=False, enable_minmax_tuning=False)),
        ({"enable_quanted_input": False, "seed": 1}, Recipe(enable_quanted_input=False, seed=1)),
        ({"quant_lm_head": True, "lr": 0.1}, Recipe(feedback=False, quant_lm_head=True, lr=0.1)),
        ({"dataset": "bundled"}, Recipe(dataset="bundled")),
        ({"dataset": ROWS}, Recipe()),
    ],
)
def test_arguments_become_a_recipe(given: dict[str, Any], expected: Recipe, llama: Path) -> None:
    assert AutoRound(llama, **given).recipe == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scheme": "W9"}, "unknown scheme 'W9'"),
        ({"recipe": "fast"}, "unknown recipe 'fast'"),
        ({"bits": 1}, "bits=1"),
        ({"iters": -1}, "iters=-1"),
        ({"iters": 0, "nsamples": 8}, "nsamples has no effect without tuning"),
        ({"iters": 0, "dataset": "bundled"}, "dataset has no effect without tuning"),
        ({"iters": 0, "dataset": ROWS}, "dataset has no effect without tuning"),
        ({"recipe": "rtn", "enable_quanted_input": True}, "enable_quanted_input has no effect"),
        ({"device_map": "nope"}, "device 'nope' is not on this machine; choose auto or"),
        ({"device_map": 7}, "device '7' is not on this machine"),
    ],
)
def test_refused_arguments(given: dict[str, Any], words: str, llama: Path) -> None:
    with pytest.raises(InputError, match=words):
        AutoRound(llama, **given)


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="low_gpu_usage"):
        AutoRound("model", low_gpu_usage=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "name", ["low_gpu_mem_usage", "enable_deterministic_algorithms", "enable_torch_compile"]
)
def test_choices_that_are_none_say_so(name: str, llama: Path) -> None:
    given: dict[str, Any] = {name: True}
    with pytest.warns(UserWarning, match=f"{name} changes nothing: in every run"):
        AutoRound(llama, **given)


def test_model_of_the_wrong_kind() -> None:
    with pytest.raises(InputError, match="model is a int; give a directory or a transformers"):
        AutoRound(5)


# ---- quantizing ------------------------------------------------------------------------------


def test_quantize_returns_a_running_model(llama: Path) -> None:
    model, schemes = rtn(llama, layer_config={"o_proj": {"bits": 8}}).quantize()
    quantized = {n for n, m in model.named_modules() if isinstance(m, QLinear | QExperts)}
    assert quantized == set(schemes)
    assert schemes["model.layers.2.self_attn.o_proj"] == Scheme(8, 32)
    assert schemes["model.layers.2.self_attn.q_proj"] == Scheme(4, 32)
    with torch.no_grad():
        assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_saved_is_what_was_quantized(llama: Path, tmp_path: Path) -> None:
    made = rtn(llama)
    model, _ = made.quantize()
    assert made.save_quantized(tmp_path / "a") == tmp_path / "a"
    loaded, where = rtn(llama).quantize_and_save(tmp_path / "b")
    assert where == tmp_path / "b"
    assert same_files(tmp_path / "a", tmp_path / "b")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        logits = [m(ids).logits for m in (model, loaded, autoround.load(tmp_path / "a"))]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_quantizing_twice(llama: Path) -> None:
    made = rtn(llama)
    first, _ = made.quantize()
    second, _ = made.quantize()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


def test_save_before_quantize(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing is quantized yet; call quantize\(\)"):
        rtn(llama).save_quantized(tmp_path / "out")


def test_save_in_another_format(llama: Path, tmp_path: Path) -> None:
    made = rtn(llama)
    model, _ = made.quantize()
    made.save_quantized(tmp_path / "awq", format="auto_awq")
    own = oracle.config(tmp_path / "awq")["quantization_config"]
    assert own["quant_method"] == "awq"
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, autoround.load(tmp_path / "awq")(ids).logits)


def test_save_in_a_format_that_cannot_hold_it(llama: Path, tmp_path: Path) -> None:
    made = rtn(llama, bits=3)
    made.quantize()
    with pytest.raises(InputError, match=r"auto_awq cannot hold .* 4 bits, not 3.*use --format"):
        made.save_quantized(tmp_path / "awq", format="auto_awq")
    assert not (tmp_path / "awq").exists()


def test_save_over_something(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    made = rtn(llama)
    made.quantize()
    for call in (made.save_quantized, made.quantize_and_save):
        with pytest.raises(InputError, match="is not empty"):
            call(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_format_of_quantize_and_save(llama: Path, tmp_path: Path) -> None:
    rtn(llama).quantize_and_save(tmp_path / "out", format="auto_round:auto_awq")
    own = oracle.config(tmp_path / "out")["quantization_config"]
    assert own["packing_format"] == "auto_round:auto_awq"


def test_default_directory(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, where = rtn(llama).quantize_and_save()
    assert where == Path("llama-w4g32")
    assert (tmp_path / "llama-w4g32/config.json").is_file()


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_moe"])
def test_model_object(name: str, tmp_path: Path) -> None:
    """A loaded model gives the bytes its directory gives."""
    source = zoo.save(name, tmp_path / "float")
    rtn(source).quantize_and_save(tmp_path / "a")
    rtn(zoo.plain(name, source)).quantize_and_save(tmp_path / "b")
    a, b = oracle.read(tmp_path / "a"), oracle.read(tmp_path / "b")
    assert set(a) == set(b)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_model_object_with_its_tokenizer(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(PGDOC)
    tokenizer = transformers.AutoTokenizer.from_pretrained(PGDOC)
    options = {"iters": 2, "nsamples": 4, "seqlen": 32, "batch_size": 2}
    _, where = AutoRound(model, tokenizer, **options).quantize_and_save(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(where)
    assert again("a query plan").input_ids == tokenizer("a query plan").input_ids


Given = Callable[[], Any]


@pytest.mark.parametrize(
    "dataset",
    [
        lambda: ROWS,
        lambda: torch.tensor(ROWS),
        lambda: [{"input_ids": row} for row in ROWS],
        lambda: iter(ROWS),
        lambda: torch.utils.data.DataLoader([torch.tensor(row) for row in ROWS], batch_size=4),
    ],
    ids=["lists", "tensor", "dicts", "iterator", "DataLoader"],
)
def test_token_ids_need_no_tokenizer(dataset: Given, llama: Path, tmp_path: Path) -> None:
    own = SMALL | {"dataset": dataset()}
    AutoRound(llama, group_size=32, **own).quantize_and_save(tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file()


def test_tuned_on_texts_with_a_given_tokenizer(tmp_path: Path) -> None:
    source = zoo.save("qwen3", tmp_path / "m", overrides={"vocab_size": 4096})
    tokenizer = transformers.AutoTokenizer.from_pretrained(PGDOC)
    own = SMALL | {"dataset": ["The planner chooses a path. " * 40]}
    with pytest.raises(InputError, match="there is no tokenizer: pass the model's tokenizer"):
        AutoRound(source, **own).quantize()
    model, _ = AutoRound(source, tokenizer, **own).quantize()
    assert any(isinstance(m, QLinear) for m in model.modules())


# ---- the package -----------------------------------------------------------------------------


def test_names_of_the_package() -> None:
    for name in autoround.__all__:
        assert getattr(autoround, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        autoround.nope  # noqa: B018


def test_import_is_light() -> None:
    code = "import sys, autoround; print({'torch', 'transformers', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
