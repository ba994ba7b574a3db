# SPDX-License-Identifier: Apache-2.0
"""``README.md``: the model's card, with the front matter that the hub reads."""

import re
from collections.abc import Iterator

from autoround.report.facts import Report
from autoround.report.words import number, quality, size, verdict

#: By this line a card is known as ours, and may be written anew.
MARK = "<!-- made by `autoround report` -->"


def card(report: Report) -> str:
    """The whole file."""
    return "\n".join([*_front(report), MARK, *_body(report)]) + "\n"


def _front(r: Report) -> Iterator[str]:
    yield "---"
    if "/" in r.base_model:
        yield f"base_model: {_plain(r.base_model)}"
        yield "base_model_relation: quantized"
    for key, value in r.card.items():
        yield f"{key}: {_plain(value)}"
    yield "library_name: transformers"
    yield "tags:"
    bits = r.recipe.get("bits") or _scheme_bits(r)
    tags = ["autoround", "quantized", *([f"{bits}-bit"] if bits else [])]
    yield from (f"- {tag}" for tag in tags)
    yield "---"


def _scheme_bits(r: Report) -> str:
    """Bits of most layers: ``s4:g128`` -> 4."""
    held = [m[1] for layer in r.layers if (m := re.match(r"[su](\d):", layer.scheme))]
    return max(set(held), key=held.count) if held else ""


def _plain(value: str) -> str:
    """A YAML scalar on one line."""
    safe = re.fullmatch(r"[\w./:@+-][\w ./:@+-]*", value) and ": " not in value
    return value if safe else '"' + re.sub(r'[\\"\x00-\x1f]', "", value) + '"'


def _body(r: Report) -> Iterator[str]:
    e, first = r.evaluation, r.directories[0]
    yield f"# {r.model}"
    yield ""
    made = f"quantized with autoround {r.versions['autoround']}" if r.versions else "quantized"
    sizes = f"{size(e.nbytes)} of weights ({size(e.float_nbytes)} before)"
    yield f"{r.base_model}, {made}: {sizes}, {first.format} format."
    yield ""
    yield verdict(e)
    yield ""
    if rows := quality(e):
        count = e.comparison.tokens if e.comparison else 0
        yield f"| {count:,} held-out tokens | quantized |" + (" noise |" if e.noise else "")
        yield "|---|---:|" + ("---:|" if e.noise else "")
        for what, own, noise in rows:
            yield f"| {what} | {own} |" + (f" {noise} |" if e.noise else "")
        yield ""
        if e.noise:
            yield f"KL in nats a token, float to quantized. Noise: {e.noise.between}."
            yield ""
    if errors := [x for x in r.layers if x.output_error is not None]:
        better = sum((x.output_error or 0) < (x.output_error_rtn or 0) for x in errors)
        worst = max(errors, key=lambda x: x.output_error or 0)
        yield f"Relative error of a layer's outputs: below rounding to nearest in {better} of "
        yield f"{len(errors)} layers; the largest is {number(worst.output_error)} ({worst.name})."
        yield ""
    yield "```python"
    yield "import autoround"
    yield ""
    yield f'model = autoround.load("{r.model}")'
    yield "```"
    yield ""
    if r.command:
        yield "Made with"
        yield ""
        yield f"    {' '.join(r.command.split())}"
        yield ""
    digest = r.calibration.get("digest")
    said = ", ".join(f"{k} {v}" for k, v in r.versions.items())
    facts = [said, f"calibration tokens sha256 `{digest}`" if digest else ""]
    if any(facts):
        yield "; ".join(f for f in facts if f) + "."
        yield ""
    for d in r.directories:
        yield f"- {d.proof}"
    yield ""
    yield "All of it, with plots: report.html; as data: report.json."
