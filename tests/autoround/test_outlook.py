# SPDX-License-Identifier: Apache-2.0
"""`autoround plan`: what it says is what a run does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from autoround.checkpoint import Checkpoint
from autoround.cli import run as command
from autoround.errors import InputError
from autoround.options import build_recipe
from autoround.recipe import Recipe
from autoround.run import pipeline
from autoround.run.estimate import Limits, bytes_of, groups, needs, savings
from autoround.run.outlook import Outlook, outlook
from autoround.run.probe import few, pace, passes

Saved = Callable[..., Path]


def wanted(**changes: Any) -> Recipe:
    return build_recipe("rtn", {"group_size": 32, **changes})


CASES: list[tuple[str, dict[str, Any]]] = [
    (name, changes)
    for name in ("llama", "qwen3_moe")
    for changes in (
        {},
        {"format": "auto_gptq:v2,mlx,fake", "sym": False},
        {"max_shard_size": "1MB", "format": "llm_compressor"},
        {"layer_config": {"down_proj": {"bits": 8}}, "ignore_layers": ("layers.1.self_attn",)},
    )
] + [("gpt2", {"format": "auto_gptq:v2,fake:float32"})]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_files_are_as_large_as_planned(
    name: str, changes: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    source = pipeline.Source(saved(name), torch.device("cpu"))
    found = outlook(wanted(**changes), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pipeline.quantize(wanted(**changes), source, tmp_path / "out")
    files = {
        directory: {f.name: f.stat().st_size for f in directory.glob("*.safetensors")}
        for directory in found.files
    }
    assert files == found.files
    first = next(d for d in found.files if d.name != "canonical")
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little")
                  for f in first.glob("*.safetensors"))  # fmt: skip
    assert sum(kind.nbytes for kind in found.kinds) == sum(files[first].values()) - headers
    assert sum(kind.count for kind in found.kinds) == len(found.plan.fates)


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pipeline.Source(saved("llama"), torch.device("cpu"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**6, 10**6 - 1000, 1000))
    with pytest.raises(InputError, match=r"0.00 GB free, the run writes .*choose another -o"):
        outlook(wanted(), source, tmp_path / "out")


def test_the_command_takes_the_options_of_quantize(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "plan",
        str(saved("llama")),
        "--recipe",
        "rtn",
        "--bits",
        "3",
        "-o",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit) as end:
        command([*words, "--group-size", "32", "--ignore-layers", "down_proj"])
    assert not end.value.code
    out = capsys.readouterr().out
    assert "3 bits" in out
    assert "asked for" in out
    assert "qgemm" in out
    assert not (tmp_path / "o").exists()


# ---- memory ------------------------------------------------------------------------------------


def planned(
    recipe: str, saved: Saved, limits: Limits | None = None, name: str = "llama", **changes: Any
) -> Outlook:
    source = pipeline.Source(saved(name), torch.device("cpu"))
    built = build_recipe(recipe, {"group_size": 32, **changes})
    return outlook(built, source, Path("nowhere"), limits)


def test_hidden_states_and_systems_are_counted(saved: Saved) -> None:
    """Against numbers written down by hand: hidden 64, three blocks, 8 samples of 16 tokens."""
    few = planned("light", saved, nsamples=8, seqlen=16)
    config = json.loads((saved("llama") / "config.json").read_text())
    one = 8 * 16 * config["hidden_size"] * 4
    assert few.needs.memory["hidden states"] == 4 * one
    assert few.needs.disk - few.nbytes == 4 * one  # two chains, two generations
    more = planned("light", saved, nsamples=16, seqlen=16)
    assert more.needs.memory["hidden states"] == 8 * one
    source = pipeline.Source(saved("llama"), torch.device("cpu"), low_cpu_mem_usage=True)
    low = outlook(build_recipe("light", {"group_size": 32, "nsamples": 8, "seqlen": 16}), source,
                  Path("nowhere"))  # fmt: skip
    assert low.needs.memory["hidden states"] == 0
    assert low.needs.disk > few.needs.disk
    assert "work on a block" not in planned("rtn", saved).needs.memory


def test_end_to_end_is_counted(saved: Saved) -> None:
    """At least what is there for sure: five numbers a scale, two logits a position in 10 bytes."""
    found = planned("rtn", saved, nsamples=8, seqlen=16, end_to_end=2)
    scales = sum(x.view.shape[0] * x.view.shape[1] // 32 for x in found.plan.layers)
    logits = 2 * 4 * 16 * 128
    assert found.needs.memory["work on a block"] > 20 * scales + 10 * logits


def test_the_largest_system_is_that_of_the_widest_input(saved: Saved) -> None:
    plan = planned("light", saved).plan
    names = [[x.view.param.rsplit(".", 2)[1] for x in group] for group in groups(plan.blocks[0])]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"],
                     ["down_proj"]]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "share", "options"),
    [("autoround", 0.999, "--low-cpu-mem-usage"), ("rtn", 0.5, None), ("light", 1.0, None)],
)
def test_the_cheapest_change_is_the_first_that_fits(
    recipe: str, share: float, options: str | None, saved: Saved
) -> None:
    whole = planned(recipe, saved).needs.ram
    found = planned(recipe, saved, Limits(ram=int(whole * share) + 10**6 * (share == 1.0)))
    assert (found.fit.refused is None) == (share == 1.0)
    if options:
        assert found.fit.change is not None
        assert found.fit.change[0] == options
        assert found.fit.change[1].ram < whole * share
    elif share < 1:
        assert found.fit.change is None


def test_savings_only_name_what_changes_something() -> None:
    recipe = build_recipe("light", {"batch_size": 2, "format": "auto_round,mlx"})
    ways = [words for words, _, _ in savings(recipe, low_memory=True)]
    assert not [w for w in ways if "--low" in w or "--batch-size 4" in w or "32" in w]
    assert ways[0] == "--batch-size 1"
    assert "--batch-size 1 --seqlen 512 --nsamples 8" in ways
    assert ways[-2].startswith("--format auto_round,")
    assert ways[-1] == "--recipe rtn"
    best = [(words, made) for words, made, _ in savings(build_recipe("best", {}), low_memory=False)]
    assert not dict(best)["--end-to-end 0"].end_to_end
    assert not best[-1][1].calibrates


def test_disk_and_device(saved: Saved) -> None:
    both = {"format": "auto_gptq:v2,fake", "sym": False}
    found = planned("rtn", saved, Limits(disk=1), **both)
    assert found.fit.refused
    assert found.fit.refused.startswith("disk: needs")
    most = planned("rtn", saved, **both).nbytes
    found = planned("rtn", saved, Limits(disk=most - 1), **both)
    assert found.fit.change
    assert found.fit.change[0].startswith("--format auto_gptq:v2")
    plan = planned("light", saved).plan
    recipe = build_recipe("light", {"group_size": 32})
    here, there = (
        needs(plan, recipe, 0, files=0, low_memory=False, accelerated=far) for far in (False, True)
    )
    assert here.device == 0
    device = ("embeddings", "block", "work on a block")
    assert there.device == sum(here.memory[what] for what in device)
    assert there.memory["hidden states"] == here.memory["hidden states"] > 0


@pytest.mark.parametrize("text", ["16", "GB", "-1GB", "nanGB", "16XB", "0MB"])
def test_a_limit_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match=r"--ram .*write it like 16GB"):
        bytes_of(text, "ram")


def test_plan_as_json_and_its_exit_code(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(saved("llama")), "--recipe", "rtn", "--group-size", "32", "--json"]
    for limit, code in (("100GB", 0), ("1MB", 1)):
        with pytest.raises(SystemExit) as end:
            command([*words, "--ram", limit])
        assert (end.value.code or 0) == code
        found = json.loads(capsys.readouterr().out)
        assert found["fits"] is (code == 0)
        assert found["nbytes"] == sum(sum(f.values()) for f in found["files"].values())
        assert {*found["tensors"]} == {*Checkpoint(saved("llama")).entries}
        assert found["ram"] == sum(found["memory"].values())


def test_a_probe_tells_what_the_run_takes(saved: Saved, tmp_path: Path) -> None:
    """From two blocks with few samples and few steps: three blocks with more of both."""
    text = tmp_path / "text.jsonl"
    ids = torch.randint(0, 90, (32, 16), generator=torch.Generator().manual_seed(0))
    text.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in ids))
    given = {"group_size": 32, "nsamples": 32, "seqlen": 16, "dataset": str(text)}
    source = pipeline.Source(saved("llama"), torch.device("cpu"))
    found = outlook(build_recipe("light", given), source, tmp_path / "out", probed=True).pace
    assert found is not None
    assert found.blocks == 3
    assert 0 < found.block < found.seconds
    least, most = found.range
    assert least < found.seconds < most
    assert not [path for path in tmp_path.iterdir() if "probe" in path.name]


def test_a_probe_tries_samples_and_steps() -> None:
    tried = few(build_recipe("signround", {"nsamples": 128, "iters": 200}))
    assert [(r.nsamples, r.iters) for r in tried] == [(8, 4), (24, 4), (8, 12)]
    tried = few(build_recipe("signround", {"nsamples": 5, "iters": 6}))
    assert [(r.nsamples, r.iters) for r in tried] == [(5, 4), (5, 6)]
    assert few(build_recipe("rtn", {})) == [build_recipe("rtn", {})]


def test_a_probe_tries_what_takes_the_whole_model(saved: Saved, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    ids = torch.randint(0, 90, (32, 16), generator=torch.Generator().manual_seed(0))
    text.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in ids))
    given = {"group_size": 32, "nsamples": 32, "seqlen": 16, "dataset": str(text)}
    recipe = build_recipe("signround", given | {"iters": 2, "end_to_end": 40, "nblocks": 2})
    found = pace(recipe, pipeline.Source(saved("llama"), torch.device("cpu")), tmp_path / "out")
    assert found.blocks == 2
    assert 0 < found.whole < found.seconds
    assert found.seconds == 2 * found.before + 2 * found.block + found.whole
    assert not [path for path in tmp_path.iterdir() if "probe" in path.name]


@pytest.mark.parametrize(
    ("n", "steps", "rows", "held"),
    [(8, 6, 8, 1), (24, 6, 24, 3), (512, 200, 512, 16), (512, 5, 36, 16)],
)
def test_samples_that_pass_beside_the_steps(n: int, steps: int, rows: int, held: int) -> None:
    """Each once for the float model; those held out before, and after with three shares."""
    assert passes(n, steps) == rows + 4 * held
