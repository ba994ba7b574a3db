# SPDX-License-Identifier: Apache-2.0
"""``report.html``: one file without scripts, fonts or anything else to fetch."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape

from autoround.report import plots
from autoround.report.facts import Report
from autoround.report.layers import Layer
from autoround.report.plots import Axis, Cell, Series
from autoround.report.words import clock, number, quality, share, size, verdict

CSS = """
:root{--bg:#fff;--fg:#1c2128;--dim:#57606a;--line:#d8dee4;--card:#f6f8fa;--a:#0969da;--b:#9a6700;
--good:#1a7f37;--bad:#cf222e;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--dim:#9198a1;--line:#30363d;
--card:#161b22;--a:#58a6ff;--b:#d29922;--good:#3fb950;--bad:#f85149}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:40px 0 8px}
h3{font-size:1rem;margin:0 0 2px}
p{margin:8px 0;max-width:76ch}
.dim,figcaption{color:var(--dim)} .good{color:var(--good)} .bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.tile b{display:block;font-size:1.35rem;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span{color:var(--dim);font-size:.85rem}
.plots{display:grid;gap:28px 32px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr))}
figure{margin:0;min-width:0}
figcaption{font-size:.85rem;margin-top:4px}
svg{width:100%;height:auto;display:block;overflow:visible}
svg text{font:12px system-ui,sans-serif;fill:var(--fg)} svg text.dim{fill:var(--dim)}
.end{text-anchor:end} .mid{text-anchor:middle}
.grid{stroke:var(--line);fill:none} .axis{stroke:var(--dim);fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round} .line.a{stroke:var(--a)}
.line.b{stroke:var(--b);stroke-dasharray:5 3} .dot.a,.bar.a{fill:var(--a)}
.dot.b{fill:var(--bg);stroke:var(--b);stroke-width:1.6} .bar.b{fill:var(--b)}
.join{stroke:var(--dim);stroke-opacity:.5} .cell{fill:var(--a)}
.key{white-space:nowrap;margin-right:12px} .key i{display:inline-block;width:18px;height:0;
border-top:3px solid var(--a);vertical-align:middle;margin-right:5px}
.key.b i{border-top:3px dashed var(--b)}
.key.dot i{width:9px;height:9px;border-radius:5px;
border:2px solid var(--a);background:var(--a)} .key.dot.b i{border-color:var(--b);background:none}
.scroll{overflow-x:auto;margin:16px 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--dim)} td.n,th.n{text-align:right;white-space:nowrap}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px;
overflow-x:auto;font-size:.85rem} code{font-family:ui-monospace,monospace}
.long{overflow-wrap:anywhere} details{margin:16px 0} summary{cursor:pointer}
"""


def page(report: Report) -> str:
    """The whole file."""
    title = escape(f"{report.model}: quantization report")
    body = "".join(
        part
        for make in (_head, _quality, _layers, _blocks, _files, _provenance)
        for part in make(report)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"/>'
        f"<title>{title}</title><style>{CSS}</style></head><body><main>{body}</main></body></html>\n"
    )


# ---- pieces ------------------------------------------------------------------------------------


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> str:
    """The last ``numbers`` columns to the right. Cells are escaped."""
    first = len(heads) - numbers

    def line(cells: Sequence[str], tag: str) -> str:
        marks = ["" if i < first else ' class="n"' for i in range(len(cells))]
        inner = "".join(
            f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True)
        )
        return f"<tr>{inner}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f'<div class="scroll"><table><thead>{line(heads, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(title: str, svg: str, caption: str, keys: Sequence[tuple[str, str]] = ()) -> str:
    marks = "".join(f'<span class="key {css}"><i></i>{escape(text)}</span>' for css, text in keys)
    return (
        f"<figure><h3>{escape(title)}</h3>{svg}"
        f"<figcaption>{marks}{escape(caption)}</figcaption></figure>"
    )


def _tiles(rows: Iterable[tuple[str, str]]) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in rows
    )
    return f'<div class="tiles">{tiles}</div>'


# ---- sections ----------------------------------------------------------------------------------


def _head(r: Report) -> Iterator[str]:
    e, bits = r.evaluation, _bits(r)
    yield f"<h1>{escape(r.model)}</h1>"
    yield (
        f'<p class="dim">{escape(r.base_model)}, {bits:.4g} bits a weight in '
        f"{e.quantized_layers or len(_held(r))} layers, by autoround {escape(r.autoround)}</p>"
    )
    yield f"<p>{escape(verdict(e))}</p>"
    rows = []
    if c := e.comparison:
        floor = f", noise {number(e.noise.comparison.kl)}" if e.noise else ""
        same = f", noise {share(e.noise.comparison.same_top)}" if e.noise else ""
        rows = [
            (number(c.kl), f"KL, nats a token{floor}"),
            (share(c.same_top), f"same top token{same}"),
            (f"{c.perplexity:.3f}", f"perplexity, float {c.float_perplexity:.3f}"),
        ]
    if e.cosine is not None:
        rows.append((f"{e.cosine:.5f}", "cosine of embeddings"))
    ratio = e.float_nbytes / e.nbytes if e.nbytes else 0
    rows.append((size(e.nbytes), f"weights, float {size(e.float_nbytes)} ({ratio:.2f}x)"))
    if r.seconds is not None:
        rows.append((clock(r.seconds), "to quantize"))
    yield _tiles(rows)


def _bits(r: Report) -> float:
    held = _held(r)
    sizes = [layer.shape[0] * layer.shape[1] for layer in held]
    total = sum(layer.bits * n for layer, n in zip(held, sizes, strict=True))
    return total / sum(sizes) if sizes else r.evaluation.bits_per_weight


def _held(r: Report) -> list[Layer]:
    """Layers that are quantized."""
    return [layer for layer in r.layers if ":" in layer.scheme]


def _quality(r: Report) -> Iterator[str]:
    rows = quality(r.evaluation)
    if not rows:
        return
    c, noise = r.evaluation.comparison, r.evaluation.noise
    count = f"{c.tokens:,}" if c else ""
    yield "<h2>Against the float model, on held-out text</h2>"
    said = (
        f"Noise: {noise.between}, on the same tokens." if noise else "The noise was not measured."
    )
    yield f'<p class="dim">{count} positions. {escape(said)} Lost and won: the '
    yield "text’s next token was the most likely one before and is not now, and the reverse.</p>"
    if curves := r.curves:
        yield '<div class="plots">'
        keys = [("a", "quantized"), *([("b", "noise")] if curves.noise_along else [])]
        yield _figure(
            "KL of every token, sorted", _sorted(r), "p50, p90 and p99 are marked. ", keys
        )
        yield _figure("KL along a sample", _along(r), "Mean over the samples. ", keys)
        yield "</div>"
    heads = ("", "quantized", "noise") if noise else ("", "quantized")
    yield _table(heads, [row[: len(heads)] for row in rows], len(heads) - 1)


def _sorted(r: Report) -> str:
    assert r.curves is not None
    own, noise = r.curves.percentiles, r.curves.noise_percentiles
    shown = [v for v in (*own[1:], *noise[1:]) if v > 0] or [1e-3]
    floor = max(min(shown), max(shown) * 1e-6)
    y = plots.decades("nats", [floor, *shown])
    x = Axis("per cent of tokens", 0, 100, [(t, str(t)) for t in (0, 25, 50, 75, 100)])
    lines = [Series("a", [(i, max(v, floor)) for i, v in enumerate(own)])]
    if noise:
        lines.append(Series("b", [(i, max(v, floor)) for i, v in enumerate(noise)]))
    marked = [(p, max(own[p], floor)) for p in (50, 90, 99)]
    titles = [f"p{p}: {number(v)} nats" for p, v in marked]
    return plots.chart(x, y, [*lines, Series("a", marked, "dots", titles)])


def _along(r: Report) -> str:
    assert r.curves is not None
    ends, own, noise = r.curves.ends, r.curves.along, r.curves.noise_along
    y = plots.linear("nats", 0, max(*own, *noise, 1e-12))
    x = plots.linear("token of the sample", 0, ends[-1])
    x = Axis(x.label, 0, ends[-1], [t for t in x.ticks if t[0] <= ends[-1]])
    lines = [Series("a", [*zip(ends, own, strict=True)])]
    if noise:
        lines.append(Series("b", [*zip(ends, noise, strict=True)]))
    return plots.chart(x, y, lines)


def _layers(r: Report) -> Iterator[str]:
    if not r.layers:
        return
    yield "<h2>Layers</h2>"
    yield '<div class="plots">'
    errors = [layer for layer in r.layers if layer.output_error is not None]
    if errors:
        better = sum((x.output_error or 0) < (x.output_error_rtn or 0) for x in errors)
        yield _figure(
            "Relative error of outputs",
            _grid(errors, lambda x: x.output_error or 0.0),
            f"On one sample of held-out text; strong colour is much. Below rounding to nearest in "
            f"{better} of {len(errors)} layers. At the right: mean.",
        )
    elif weighed := [layer for layer in r.layers if layer.weight_error is not None]:
        yield _figure(
            "Relative error of weights",
            _grid(weighed, lambda x: x.weight_error or 0.0),
            "Strong colour is much. At the right: mean.",
        )
    yield _figure(
        "Bits a weight",
        _grid(r.layers, lambda x: min(x.bits, 16.0), "{:.4g}".format),
        "Scales and zero levels included; 16 and more: kept. At the right: mean.",
    )
    yield "</div>"
    heads = ("matrix", "shape", "code", "bits", "size", "weights", "outputs", "outputs, RTN")
    rows = [
        (x.name, " x ".join(map(str, x.shape)), x.scheme, number(x.bits), size(x.nbytes),
         number(x.weight_error), number(x.output_error), number(x.output_error_rtn))
        for x in r.layers
    ]  # fmt: skip
    yield f"<details><summary>All {len(rows)} matrices, with their relative errors</summary>"
    yield _table(heads, rows, 5)
    yield "</details>"


def _grid(
    layers: Sequence[Layer], value: Callable[[Layer], float], say: Callable[[float], str] = number
) -> str:
    """Kinds of layers below each other, blocks side by side; alike ones of a block are averaged."""
    found: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        numbers = re.findall(r"\.(\d+)(?=\.|$)", layer.name)
        kind = re.sub(r"^.*?\.\d+\.", "", layer.name) if numbers else layer.name
        kind = re.sub(r"\.\d+(?=\.|$)", ".*", kind)
        found.setdefault(kind, {}).setdefault(int(numbers[0]) if numbers else 0, []).append(
            value(layer)
        )
    high = max((v for row in found.values() for vs in row.values() for v in vs), default=0) or 1.0
    columns = 1 + max(i for row in found.values() for i in row)
    rows = []
    for kind, row in found.items():
        means = {i: sum(vs) / len(vs) for i, vs in row.items()}
        cells = [
            Cell(means[i] / high, f"{kind}, block {i}: {say(means[i])}") if i in means else None
            for i in range(columns)
        ]
        rows.append((_short(kind), cells, say(sum(means.values()) / len(means))))
    return plots.grid(rows, "block")


def _short(name: str) -> str:
    return name if len(name) <= 28 else "…" + name[-27:]


def _blocks(r: Report) -> Iterator[str]:
    tuned = [b for b in r.blocks if b.loss is not None and b.loss_rtn is not None]
    timed = [b for b in r.blocks if b.seconds is not None]
    if not tuned and not timed:
        return
    yield '<h2>Blocks</h2><div class="plots">'
    if tuned:
        better = sum((b.loss or 0) < (b.loss_rtn or 0) for b in tuned)
        rtn, own = [b.loss_rtn or 0.0 for b in tuned], [b.loss or 0.0 for b in tuned]
        points = [
            Series("b", [*enumerate(rtn)], "dots", [_loss(b.name, b.loss_rtn) for b in tuned]),
            Series("a", [*enumerate(own)], "dots", [_loss(b.name, b.loss) for b in tuned]),
        ]
        y = plots.decades("error", [*rtn, *own])
        svg = plots.chart(_numbers(len(tuned)), y, points, [(0, 1)])
        yield _figure(
            "Error of each block, as a share of its output",
            svg,
            f"On samples held out of tuning; better in {better} of {len(tuned)}. ",
            [("a dot", "tuned"), ("b dot", "rounded to nearest")],
        )
    if timed:
        seconds = [b.seconds or 0.0 for b in timed]
        titles = [
            f"{b.name}: {clock(b.seconds or 0)}, peak {size(b.peak_bytes or 0)}" for b in timed
        ]
        bars = Series("a", [*enumerate(seconds)], "bars", titles)
        y = plots.linear("seconds", 0, max(*seconds, 1e-3))
        peak = max(b.peak_bytes or 0 for b in timed)
        yield _figure(
            "Seconds of each block",
            plots.chart(_numbers(len(timed)), y, [bars]),
            f"{clock(sum(seconds))} in all; peak memory {size(peak)}. ",
        )
    yield "</div>"
    if sparse := [b for b in r.blocks if b.sparse_experts]:
        yield "<p>Experts that fewer tokens reached than they have columns, tuned with the tokens "
        yield "of all experts: " + escape(", ".join(f"{b.name} {b.sparse_experts}" for b in sparse))
        yield "</p>"


def _loss(name: str, loss: float | None) -> str:
    return f"{name}: {number(loss)}"


def _numbers(count: int) -> Axis:
    step = max(1, -(-count // 10))
    return Axis("block", -0.5, count - 0.5, [(i, str(i)) for i in range(0, count, step)])


def _files(r: Report) -> Iterator[str]:
    yield "<h2>Files</h2>"
    for d in r.directories:
        css = "good" if d.verified else "bad"
        yield f'<p class="{css} long">{escape(d.proof)} ({size(d.nbytes)})</p>'
    if r.fates:
        yield "<h3>What became of every tensor</h3>"
        yield _table(("fate", "tensors"), [(k, str(v)) for k, v in r.fates.items()], 1)
    if r.kernels:
        yield "<h2>Kernels</h2><p class='dim'>What multiplies these weights on this machine: one "
        yield f"row of activations, and many. {escape(r.machine['device'])}</p>"
        rows = [
            (" x ".join(map(str, k.shape)), k.scheme, k.one, k.many, str(k.count))
            for k in r.kernels
        ]
        yield _table(("shape", "code", "one row", "many rows", "layers"), rows, 1)


def _provenance(r: Report) -> Iterator[str]:
    yield "<h2>Provenance</h2>"
    if r.command:
        yield f"<pre><code>{escape(r.command)}</code></pre>"
    text = r.evaluation.text
    rows = [
        ("quantized with", ", ".join(f"{k} {v}" for k, v in r.versions.items())),
        ("calibrated on", _calibration(r)),
        ("evaluated with", ", ".join(f"{k} {v}" for k, v in r.machine.items())),
        ("evaluated on tokens", text),
    ]
    body = "".join(
        f"<tr><th>{escape(k)}</th><td class='long'>{escape(v)}</td></tr>" for k, v in rows if v
    )
    yield f"<table><tbody>{body}</tbody></table>"
    if r.recipe:
        recipe = json.dumps(r.recipe, indent=1)
        yield f"<details><summary>Recipe</summary><pre>{escape(recipe)}</pre></details>"


def _calibration(r: Report) -> str:
    if not r.calibration:
        return "no data" if r.recipe else ""
    shape = " x ".join(map(str, r.calibration.get("shape", [])))
    return f"{shape} tokens, sha256 {r.calibration.get('digest', '')}"
