# SPDX-License-Identifier: Apache-2.0
"""Token ids that one model can take: no longer than its positions, none beyond its embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from autoround.calib.data import TokenSet, load_tokens
from autoround.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokens_for(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: str | Iterable[Any] | None,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
) -> TokenSet:
    """`load_tokens` for a model of transformers, which may lie on meta.

    ``seqlen`` is cut to what the model and its tokenizer allow. Raises InputError as `load_tokens`,
    and for ids that have no embedding.
    """
    limits = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    )
    fitting = min([seqlen, *(n for n in limits if isinstance(n, int) and n > 0)])
    tokens = load_tokens(dataset, tokenizer, nsamples=nsamples, seqlen=fitting, seed=seed)
    rows, last = model.get_input_embeddings().weight.shape[0], int(tokens.ids.max())
    if last >= rows:
        raise InputError(
            f"token {last} is outside the model's {rows} embeddings "
            f"({tokens.description}); the tokenizer or the token ids belong to another model"
        )
    return tokens
