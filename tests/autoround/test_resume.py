# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped goes on where it stopped, to the same bytes; another is refused."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from autoround.checkpoint import Checkpoint
from autoround.errors import InputError
from autoround.options import build_recipe
from autoround.run import chains, engine, journal, pipeline
from autoround.run.record import Run, Source

CPU = torch.device("cpu")
ROWS = [list(range(3 + i, 19 + i)) for i in range(8)]  # token ids for tuning
SMALL = {"nsamples": 8, "seqlen": 16, "batch_size": 4, "group_size": 32, "bits": 3}
Saved = Callable[..., Path]


class Stop(Exception):
    """What ends a process, as far as the run can tell."""


def run(source: Path, output: Path, name: str | None = None, **changes: Any) -> Run:
    means = {key: changes.pop(key) for key in ("low_cpu_mem_usage", "fresh") if key in changes}
    given = {} if name == "rtn" else SMALL
    recipe = build_recipe(name, given | {"group_size": 32} | changes)
    rows = None if name == "rtn" else ROWS
    return pipeline.quantize(recipe, Source(source, CPU, **means), output, dataset=rows)


def digest(path: Path) -> dict[str, str]:
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(path.rglob("*"))
        if f.is_file()
    }


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Says whether runs stop after every commit; forgets nothing that is on the disk."""
    original = journal.Journal.commit

    def commit(self: journal.Journal, row: dict[str, Any]) -> None:
        original(self, row)
        raise Stop

    def switch(on: bool) -> None:
        monkeypatch.setattr(journal.Journal, "commit", commit if on else original)

    switch(True)
    yield switch
    switch(False)


def finish(source: Path, output: Path, name: str | None, **changes: Any) -> int:
    """The same command until it ends; how often it was stopped."""
    for stopped in range(100):
        try:
            run(source, output, name, **changes)
        except Stop:
            continue
        return stopped
    raise AssertionError("no progress")


# ---- the same bytes ----------------------------------------------------------------------------


#: Models that are not here are stopped in the slow tests.
SOON = ("llama", "gemma3", "zamba2", "qwen3_moe")


@pytest.mark.parametrize(
    "name",
    [name if name in SOON else pytest.param(name, marks=pytest.mark.slow) for name in zoo.ZOO],
)
def test_stopped_at_every_block(
    name: str, saved: Saved, tmp_path: Path, stops: Callable[[bool], None]
) -> None:
    assert finish(saved(name), tmp_path / "stopped", None) >= 3
    stops(False)
    run(saved(name), tmp_path / "whole")
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    assert not (tmp_path / "stopped" / "journal").exists()


@pytest.mark.parametrize(
    ("name", "recipe", "changes"),
    [
        ("llama", "signround", {"iters": 4, "lr": 0.05}),
        ("zamba2", "signround2", {"iters": 2, "nblocks": 3}),
        ("llama", None, {"enable_quanted_input": False}),
        ("llama", None, {"format": "auto_gptq,mlx", "quant_lm_head": True}),
        ("llama", None, {"low_cpu_mem_usage": True}),
        ("llama", None, {"end_to_end": 2, "format": "mlx,fake", "quant_lm_head": True}),
        ("qwen3_moe", None, {"end_to_end": 2, "format": "mlx", "bits": 4}),
        ("llama", None, {"max_shard_size": "1MB", "ignore_layers": ("layers.1",)}),
        ("qwen3_moe", "signround2", {"iters": 2}),
        ("qwen3_moe", None, {"format": "mlx", "bits": 4}),
        ("gpt2", "rtn-searched", {}),
    ],
)
def test_recipes_and_formats(
    name: str, recipe: str | None, changes: dict[str, Any], saved: Saved, tmp_path: Path,
    stops: Callable[[bool], None],
) -> None:  # fmt: skip
    times = finish(saved(name), tmp_path / "stopped", recipe, **changes)
    assert times >= (2 if "nblocks" in changes else 3)
    stops(False)
    run(saved(name), tmp_path / "whole", recipe, **changes)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_without_a_model(
    name: str, saved: Saved, tmp_path: Path, stops: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rounded straight from file to file, a row for every tensor."""
    monkeypatch.setattr(journal, "EVERY", 0.0)
    assert finish(saved(name), tmp_path / "stopped", "rtn") == len(Checkpoint(saved(name)).entries)
    stops(False)
    run(saved(name), tmp_path / "whole", "rtn")
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "changes"), [("gemma3", {}), ("qwen3_moe", {}), ("gemma3", {"iters": 2, "nblocks": 2})]
)
def test_chains_computed_again(
    name: str, changes: dict[str, Any], saved: Saved, tmp_path: Path, stops: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Models that hand blocks more than the last one's output: from the written weights."""
    monkeypatch.setattr(engine.Engine, "_placed", lambda *_: False)
    assert finish(saved(name), tmp_path / "stopped", None, **changes) >= (2 if changes else 3)
    stops(False)
    run(saved(name), tmp_path / "whole", **changes)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


def test_inputs_that_are_not_those_before_are_refused(
    saved: Saved, tmp_path: Path, stops: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains that come out otherwise are noticed by their digests, and never tuned on."""
    with pytest.raises(Stop):
        run(saved("llama"), tmp_path / "out")
    monkeypatch.setattr(engine.Engine, "_placed", lambda *_: False)
    written = engine.Engine._written
    monkeypatch.setattr(
        engine.Engine,
        "_written",
        lambda self, task: {name: w * 1.01 for name, w in written(self, task).items()},
    )
    with pytest.raises(InputError, match=r"layers\.1 is given other inputs than before"):
        run(saved("llama"), tmp_path / "out")


def test_no_bit_depends_on_the_number_of_threads(saved: Saved, tmp_path: Path) -> None:
    """Why it is not in the signature."""
    before = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        run(saved("qwen3"), tmp_path / str(count))
    torch.set_num_threads(before)
    assert digest(tmp_path / "1") == digest(tmp_path / "3")


# ---- which run it is ---------------------------------------------------------------------------


def copied(source: Path, where: Path, **config: Any) -> Path:
    """A checkpoint like another, but for its config."""
    shutil.copytree(source, where)
    own = json.loads((where / "config.json").read_text()) | config
    (where / "config.json").write_text(json.dumps(own))
    return where


def nudged(source: Path, where: Path, key: str = "model.layers.2.mlp.up_proj.weight") -> Path:
    """The same but for the last bit of one weight."""
    shutil.copytree(source, where)
    entry = Checkpoint(source).entries[key]
    path = where / entry.file.name
    data = bytearray(path.read_bytes())
    data[entry.start] ^= 1
    path.write_bytes(data)
    return where


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 4}, r"recipe\.bits 3, now it is 4"),
    "samples": ({"nsamples": 4}, r"recipe\.nsamples 8, now it is 4"),
    "layers": ({"layer_config": {"layers.1": {"bits": 8}}}, r"recipe\.layer_config"),
    "format": ({"format": "auto_gptq"}, r'recipe\.format "auto_round", now it is "auto_gptq"'),
}


@pytest.mark.parametrize(
    ("case", "finished"),
    [
        *((case, False) for case in (*REFUSED, "weight", "config", "dataset", "version")),
        *((case, True) for case in ("bits", "weight")),
    ],
)
def test_another_run_is_refused(
    case: str, finished: bool, saved: Saved, tmp_path: Path, stops: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, out = saved("llama"), tmp_path / "out"
    if finished:
        stops(False)
        run(source, out)
    else:
        with pytest.raises(Stop):
            run(source, out)
    before = digest(out)
    changes, message = REFUSED.get(case, ({}, ""))
    if case == "weight":
        source, message = nudged(source, tmp_path / "other"), r"source\.model.*safetensors"
    elif case == "config":
        source, message = copied(source, tmp_path / "other", x=1), r"source\.config\.json"
    elif case == "dataset":
        monkeypatch.setitem(globals(), "ROWS", [[3, *row[1:]] for row in ROWS])
        message = r"calibration\.digest"
    elif case == "version":
        monkeypatch.setattr("autoround.run.signature.VERSION", "9.9")
        message = r'autoround "[^"]*", now it is "9\.9"'
    what = "a finished run" if finished else "a run begun"
    with pytest.raises(InputError, match=f"holds {what} with {message}.*--fresh, or choose"):
        run(source, out, **changes)
    assert digest(out) == before


def test_a_finished_run_is_proven_and_left_alone(saved: Saved, tmp_path: Path) -> None:
    first = run(saved("llama"), tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    again = run(saved("llama"), tmp_path / "out")
    assert [v.ok for v in again.verdicts] == [True]
    assert again.already
    assert not first.already
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("name", [None, "rtn"])
def test_a_finished_run_that_broke_since_is_not_said_to_be_fine(
    name: str | None, saved: Saved, tmp_path: Path
) -> None:
    run(saved("llama"), tmp_path / "out", name)
    shard = tmp_path / "out/model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-200] ^= 4
    shard.write_bytes(data)
    with pytest.raises(InputError, match="NOT VERIFIED"):
        run(saved("llama"), tmp_path / "out", name)


@pytest.mark.parametrize("finished", [False, True], ids=["begun", "finished"])
def test_fresh_begins_anew(
    finished: bool, saved: Saved, tmp_path: Path, stops: Callable[[bool], None]
) -> None:
    source, out = saved("llama"), tmp_path / "out"
    stops(not finished)
    if finished:
        run(source, out, bits=4, format="mlx")
    else:
        with pytest.raises(Stop):
            run(source, out, bits=4, format="mlx")
    stops(False)
    with pytest.raises(InputError, match="unknown format"):  # nothing is lost before it begins
        run(source, out, fresh=True, format="no such")
    assert any(out.rglob("*.safetensors*"))
    assert run(source, out, fresh=True).plan.targets[0].format.name == "auto_round"
    run(source, tmp_path / "whole")
    assert digest(out) == digest(tmp_path / "whole")


def test_fresh_removes_nothing_but_runs(saved: Saved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(saved("llama"), out)
    (out / "thesis.docx").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.docx is no part of a run"):
        run(saved("llama"), out, fresh=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        run(saved("llama"), other, fresh=True)


def test_two_runs_in_one_directory(
    saved: Saved, tmp_path: Path, stops: Callable[[bool], None]
) -> None:
    source, out = saved("llama"), tmp_path / "out"
    with pytest.raises(Stop):
        run(source, out)
    before = digest(out)
    with (out / "journal/lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for fresh in (False, True):
            with pytest.raises(InputError, match="another run is writing to"):
                run(source, out, fresh=fresh)
    assert digest(out) == before


# ---- damage ------------------------------------------------------------------------------------


def begun(source: Path, out: Path, blocks: int = 2) -> None:
    for _ in range(blocks):
        with pytest.raises(Stop):
            run(source, out)


#: What is damaged, and what is said of it. Without run.json there is no run, without the last row
#: an earlier one.
DAMAGE = [
    ("journal/run.json", "not as it was written"),
    ("journal/00000.json", "not as it was written"),
    ("journal/00001.json", "not as it was written"),
    ("model.safetensors.partial", "not what was written there"),
]
GONE = ("journal/run.json", "journal/00001.json")


@pytest.mark.parametrize(
    ("file", "message", "how"),
    [(*row, how) for row in DAMAGE for how in ("flip", "cut", "gone")
     if how != "gone" or row[0] not in GONE],
)  # fmt: skip
def test_damage_is_found(
    file: str, message: str, how: str, saved: Saved, tmp_path: Path,
    stops: Callable[[bool], None],
) -> None:  # fmt: skip
    """No state is trusted before it is proven."""
    source, out = saved("llama"), tmp_path / "out"
    begun(source, out)
    path = next(out.glob(file))
    data = bytearray(path.read_bytes())
    entry = Checkpoint(source).entries["model.embed_tokens.weight"]
    at = len(data) // 3 if "partial" not in file else 20_000  # inside the embeddings
    assert entry.nbytes > 20_000
    if how == "flip":
        data[at] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[:at])
    else:
        path.unlink()
    with pytest.raises(InputError, match=f"{message}|cut short|No such file|is not the file"):
        run(source, out)


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone"])
def test_damaged_chains_are_computed_again(
    how: str, saved: Saved, tmp_path: Path, stops: Callable[[bool], None]
) -> None:
    """They need not be on the disk for a row to hold."""
    source, out = saved("llama"), tmp_path / "out"
    begun(source, out)
    path = next(out.glob("journal/*.chains"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    wanted = {"flip": data, "cut": data[:1000], "empty": b""}
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(wanted[how])
    stops(False)
    run(source, out)
    run(source, tmp_path / "whole")
    assert digest(out) == digest(tmp_path / "whole")


# ---- chains ------------------------------------------------------------------------------------


def test_chains_are_read_back_as_they_were(tmp_path: Path) -> None:
    bias = torch.randn(1, 2, 3)
    values = {
        0: torch.randn(1, 5, 7).bfloat16(),
        1: (torch.randn(3), None, [bias, 1, True]),
        2: (torch.zeros(0, 4), bias, {"a": bias.t().contiguous().t() if bias.ndim == 2 else bias}),
        3: "text",
    }
    spool = chains.Spool(tmp_path, chains.Digests())
    spool.add(values)
    name = spool.close()
    assert name is not None
    found = chains.read(tmp_path / name, spool.trees, CPU)
    assert torch.equal(found[0], values[0])
    assert torch.equal(found[1][2][0], bias)
    assert found[1][2][0] is found[2][1]  # one memory stays one
    assert found[2][0].shape == (0, 4)
    assert found[3] == "text"
    found[1][2][0].add_(1)  # private: the file stays as it is
    assert torch.equal(chains.read(tmp_path / name, spool.trees, CPU)[2][1], bias)


def test_what_is_not_known_is_opaque(tmp_path: Path) -> None:
    spool = chains.Spool(tmp_path, chains.Digests())
    spool.add({0: (torch.ones(2), object())})
    assert spool.close() is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(chains.Opaque):
        chains.Digests().value([{1, 2}])


def test_digests_see_what_changes_in_place() -> None:
    digests, x = chains.Digests(), torch.zeros(4)
    before = digests.of(x)
    x[2] = 1
    assert digests.of(x) != before
    assert digests.value((x, 1)) != digests.value((x, 2))
    assert digests.value({"a": x}) != digests.value({"b": x})
    assert digests.value([x]) != digests.value((x,))
