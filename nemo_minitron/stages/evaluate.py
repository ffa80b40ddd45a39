"""Stage `evaluate`: held-out loss of every model of the run, on the same tokens.

One JSON file a model; what has been measured before, on the same weights and tokens, is not measured again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Checkpoint, read_json, write_json
from nemo_minitron.evaluate.loss import heldout_loss
from nemo_minitron.model.build import load_model, transformer_config
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.data import RecipeData, prepared_data, split_samples
from nemo_minitron.stages.registry import is_current

MODELS = {"pruned": "prune", "distilled": "distill", "ce": "ce", "scratch": "scratch"}
"""Name of each model in the summary -> the stage that made it; the teacher comes first."""


def models_there(context: Context) -> dict[str, Path]:
    """Directories of the models that there are by now: the teacher, and those that this very recipe has made."""
    found = {"teacher": context.teacher_path()}
    done = {name: stage for name, stage in MODELS.items() if is_current(context, stage)}
    return found | {name: context.stage_dir(stage) / "checkpoint" for name, stage in done.items()}


def run(context: Context) -> dict[str, Any]:
    """Measure what has not been measured; every rank takes part."""
    losses = {name: _measure(context, name, context.read(path)) for name, path in models_there(context).items()}
    for name, record in losses.items():
        bits = "" if record["bits_per_byte"] is None else f", {record['bits_per_byte']:.4f} bits/byte"
        context.say(f"[evaluate] {name:<10} {record['loss']:.4f} nats/token{bits}")
    return {"models": losses}


def _measure(context: Context, name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    arch = checkpoint.arch
    context.layout.check(arch, name=name, seq_length=context.config.data.seq_length)
    prepared = prepared_data(context, checkpoint.path, arch)
    key = {"weights_digest": checkpoint.weights_digest, "data_digest": prepared.digest,
           "seq_length": context.config.data.seq_length}
    path = context.stage_dir("evaluate") / f"{name}.json"
    known = read_json(path) if path.exists() else {}
    # one rank's look at the files decides for all: another may look after rank 0 has written
    found: dict[str, Any] | None = context.share(known if known.items() >= key.items() else None)
    record = found or key | _loss(context, checkpoint, prepared)
    context.barrier()
    if context.rank == 0:
        write_json(path, record)
    return record


def _loss(context: Context, checkpoint: Checkpoint, prepared: RecipeData) -> dict[str, Any]:
    """Loss in nats/token over every predicted held-out token, and in bits per byte of the held-out text."""
    model = load_model(checkpoint.arch, checkpoint.path, transformer_config(checkpoint.arch, context.layout))
    samples = split_samples(context, prepared, "heldout", checkpoint.arch)
    result = heldout_loss(model, samples, layout=context.layout,
                          micro_batch_size=context.config.evaluate.micro_batch_size,
                          chunk_tokens=context.config.train.chunk_tokens)
    num_bytes = prepared.num_heldout_bytes
    bits = None if num_bytes is None else result.nats / math.log(2) / num_bytes
    return {"loss": result.loss, "num_tokens": result.num_tokens, "num_bytes": num_bytes, "bits_per_byte": bits}
