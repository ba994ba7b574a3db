# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them; the same on the page and on the card."""

from collections.abc import Callable

from autoround.evaluate import Comparison, Evaluation


def number(x: float | None) -> str:
    """Three significant digits; nothing for what was not measured."""
    if x is None:
        return "–"
    return f"{x:.3g}" if x == 0 or 1e-4 <= abs(x) < 1e4 else f"{x:.2e}"


def share(x: float) -> str:
    """Per cent."""
    return f"{x:.2%}"


def size(n: float) -> str:
    """Bytes, in decimal units."""
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def clock(seconds: float) -> str:
    """Hours, minutes, seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def verdict(found: Evaluation) -> str:
    """The outcome in one sentence."""
    if found.cosine is not None:
        return f"Sentence embeddings keep a cosine of {found.cosine:.5f} to the float model's."
    c = found.comparison
    if c is None:
        return ""
    words = (
        f"KL divergence {number(c.kl)} nats a token from the float model; the same most likely "
        f"token in {share(c.same_top)} of {c.tokens:,} positions; perplexity "
        f"{c.float_perplexity:.3f} → {c.perplexity:.3f} ({_change(c)})."
    )
    if found.noise is not None:
        n = found.noise.comparison
        words += (
            f" {found.noise.between[0].upper()}{found.noise.between[1:]} differ by {number(n.kl)} "
            f"nats and agree in {share(n.same_top)}: below that, nothing can be told."
        )
    return words


def _change(c: Comparison) -> str:
    return f"{c.perplexity / c.float_perplexity - 1:+.2%}"


def quality(found: Evaluation) -> list[tuple[str, str, str]]:
    """Rows of (what, quantized, noise) for language models; the noise is empty where unmeasured."""
    c = found.comparison
    if c is None:
        return []
    rows = []
    for what, name, say in _ROWS:
        noise = say(getattr(found.noise.comparison, name)) if found.noise else ""
        rows.append((what, say(getattr(c, name)), noise))
    return [*rows, ("perplexity of the float model", f"{c.float_perplexity:.4f}", "")]


_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("KL, mean", "kl", number),
    ("KL, median", "kl_median", number),
    ("KL, p90", "kl_p90", number),
    ("KL, p99", "kl_p99", number),
    ("same top token", "same_top", share),
    ("right tokens lost", "lost", share),
    ("right tokens won", "won", share),
    ("perplexity", "perplexity", "{:.4f}".format),
)
