# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: what `autoround generate` does."""

import time
from collections.abc import Iterator

from torch import Tensor

from autoround.checkpoint import Checkpoint, resolve
from autoround.errors import InputError, blamed
from autoround.inference.decoder import continuation
from autoround.inference.loading import ANEW, load
from autoround.models import tokenizer_of


class Writer:
    """A loaded model with its tokenizer. Raises InputError when either is missing.

    ``compute``: ``exact`` or ``fast`` products, as for `autoround.load`.
    """

    def __init__(
        self, model: str, *, compute: str = "exact", device_map: str | int | None = None
    ) -> None:
        where = Checkpoint(resolve(model), quantized=True).path
        self.tokenizer, reason = tokenizer_of(where)
        if self.tokenizer is None:
            raise InputError(
                f"{model} has no tokenizer that loads; generation needs one ({reason})"
            )
        self.model, self.compute = load(where, device_map=device_map, compute=compute), compute
        if self.model.get_output_embeddings() is None:
            raise InputError(
                f"{where}: {type(self.model).__name__} is no language model; it cannot write"
            )
        self.report, self._where = "", where

    def _tokens(self, text: str) -> Tensor:
        """``text`` in tokens that the model has. Raises InputError."""
        with blamed(f"{self._where}/tokenizer.json: it does not read text", ANEW):
            ids: Tensor = self.tokenizer(text, return_tensors="pt").input_ids[0]
        rows = self.model.get_input_embeddings().weight.shape[0]
        if not len(ids) or int(ids.max()) >= rows:
            raise InputError(
                f"{self._where}/tokenizer.json makes {ids.tolist()[:8]} of the prompt, the model "
                f"has {rows} tokens; {ANEW}"
            )
        return ids.to(self.model.device)

    def write(
        self, text: str, limit: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Pieces of the continuation of ``text``, at most ``limit`` tokens; then sets ``report``.

        ``temperature`` 0 takes the likeliest token; above, samples with ``seed``.
        """
        if not text:
            raise InputError("the prompt is empty; give some text to continue")
        ids = self._tokens(text)
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(most, int) and len(ids) + limit > most:
            raise InputError(
                f"{self._where}: {len(ids)} tokens and {limit} more exceed the model's {most}; "
                "ask for fewer"
            )
        made, shown, times = list[int](), "", [time.perf_counter()]
        for token in continuation(self.model, ids, limit, temperature=temperature, seed=seed):
            times.append(time.perf_counter())
            made.append(token)
            with blamed(f"{self._where}/tokenizer.json: it does not write text", ANEW):
                known = self.tokenizer.decode(made, skip_special_tokens=True)
            if not known.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
                yield known[len(shown) :]
                shown = known
        first = len(ids) / (times[1] - times[0]) if made else 0.0
        rest = (len(made) - 1) / (times[-1] - times[1]) if len(made) > 1 else 0.0
        self.report = (
            f"{len(ids)} tokens read at {first:.0f}/s, {len(made)} written at {rest:.1f}/s, "
            f"{self.compute} products"
        )
