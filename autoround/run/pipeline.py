# SPDX-License-Identifier: Apache-2.0
"""One run: decide everything, take up what is there, quantize block by block, prove it."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autoround.calib import TokenSet, tokens_for
from autoround.checkpoint import Checkpoint, resolve
from autoround.errors import InputError
from autoround.models import StreamedModel, survey_of, tokenizer_of
from autoround.recipe import Recipe, shard_bytes
from autoround.run import stream
from autoround.run.artefact import Artefact, places
from autoround.run.directory import claim
from autoround.run.engine import Engine
from autoround.run.events import Calibrated, Finished, Listener, Planned, unheard
from autoround.run.plan import make_plan
from autoround.run.record import Run, Source
from autoround.run.signature import signature


def quantize(
    recipe: Recipe,
    source: Source,
    output: Path,
    *,
    tokenizer: Any = None,
    dataset: str | Iterable[Any] | None = None,
    listener: Listener = unheard,
) -> Run:
    """Quantize a checkpoint into ``output``: a new or empty directory, or one that holds this run.

    A run that was stopped goes on after its last committed block, to the same bytes; one that is
    finished is proven again, and that is all. ``dataset`` overrides the
    recipe's with Python objects; ``tokenizer`` the checkpoint's own. Raises InputError before any
    work for input that cannot succeed, and for a directory that holds another run. An exception
    before the first block is committed leaves ``output`` as it was.
    """
    started = time.perf_counter()
    checkpoint = Checkpoint(resolve(str(source.model)))
    if stream.refuse(recipe, checkpoint) is None:
        return stream.quantize(recipe, checkpoint, output, listener, fresh=source.fresh)
    with claim(output, fresh=source.fresh) as journal:
        streamed = StreamedModel(
            checkpoint, device=source.device, trust_remote_code=source.trust_remote_code
        )
        plan = make_plan(survey_of(streamed), recipe)
        listener(Planned(plan))
        given = recipe.dataset if dataset is None else dataset
        tokens = _tokens(recipe, streamed, tokenizer, given) if recipe.calibrates else None
        if tokens:
            listener(Calibrated(tokens))
        content = checkpoint.content(checkpoint.scan_finite())
        signed = signature(recipe, content, tokens, source.device, source.trust_remote_code)
        run = Run(output, plan, tokens, listener, checkpoint.total_bytes, signed)
        journal.begin(signed, len(plan.blocks))
        run.already = journal.record is not None
        if not run.already:
            shard = shard_bytes(recipe.max_shard_size)
            with Artefact(
                plan.contents, plan.written, output, shard, rows=journal.rows
            ) as artefact:
                spill = source.low_cpu_mem_usage
                Engine(recipe, streamed, artefact, run, journal, spill).run(tokens)
            run.finish(artefact)
        run.prove(places(plan.targets, output))
        journal.close()
    run.seconds = time.perf_counter() - started
    listener(Finished(run))
    return run


def _tokens(
    recipe: Recipe, streamed: StreamedModel, tokenizer: Any, dataset: str | Iterable[Any] | None
) -> TokenSet:
    if streamed.model.main_input_name != "input_ids" or streamed.model.config.is_encoder_decoder:
        raise InputError(
            f"{streamed.checkpoint.path}: {type(streamed.model).__name__} does not run on text "
            "alone, so it cannot be tuned; use --recipe rtn"
        )
    reason = ""
    if tokenizer is None:
        tokenizer, reason = tokenizer_of(streamed.checkpoint.path)
    try:
        return tokens_for(
            streamed.model,
            tokenizer,
            dataset,
            nsamples=recipe.nsamples,
            seqlen=recipe.seqlen,
            seed=recipe.seed,
        )
    except InputError as error:
        raise InputError(f"{error} ({reason})" if reason else str(error)) from error
