"""Stage `evaluate`: held-out loss of every model of the run, on the same tokens, and its scores in the recipe's tasks.

After an alignment also the loss of every model on the answers that were held out of it.
One JSON file a model; what has been measured before, on the same weights and tokens or questions, is not measured
again. A task's scores are written as soon as they are there.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Checkpoint, digest_files, digest_json, read_json, write_json
from nemo_minitron.checkpoint.directory import tokenizer_files
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.evaluate.live import LiveModel
from nemo_minitron.evaluate.loss import heldout_loss
from nemo_minitron.evaluate.tasks import run_task, task_key
from nemo_minitron.model.build import load_model, transformer_config
from nemo_minitron.stages.aligning import align_phases, phase_context
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.data import RecipeData, prepared_data, split_samples
from nemo_minitron.stages.registry import is_current, models_there


def run(context: Context) -> dict[str, Any]:
    """Measure what has not been measured; every rank takes part."""
    records = {name: _measure(context, name, context.read(path)) for name, path in models_there(context).items()}
    for name, record in records.items():
        bits = "" if record["bits_per_byte"] is None else f", {record['bits_per_byte']:.4f} bits/byte"
        context.say(f"[evaluate] {name:<10} {record['loss']:.4f} nats/token{bits}")
        for phase, answers in record["answers"].items():
            context.say(f"[evaluate] {name:<10} {answers['loss']:.4f} nats/token of answers ({phase})")
        for task, scores in record["tasks"].items():
            shown = scores["metrics"][scores["metric"]]
            error = "" if shown["stderr"] is None else f" +- {shown['stderr']:.4f}"
            context.say(f"[evaluate] {name:<10} {task} {shown['value']:.4f}{error} ({scores['metric']}, "
                        f"{scores['num_samples']:,} questions)")
    return {"models": records}


def _measure(context: Context, name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    arch = checkpoint.arch
    context.layout.check(arch, name=name, seq_length=context.config.data.seq_length)
    prepared = prepared_data(context, checkpoint.path, arch)
    key = {"weights_digest": checkpoint.weights_digest, "data_digest": prepared.digest,
           "seq_length": context.config.data.seq_length}
    path = context.stage_dir("evaluate") / f"{name}.json"
    known = read_json(path) if path.exists() else {}
    # one rank's look at the files decides for all: another may look after rank 0 has written
    known = context.share(known)
    record: dict[str, Any] = dict(known) if known.items() >= key.items() else key | _loss(context, checkpoint, prepared)
    record["measured"] = known.get("measured", {})
    same = known.get("weights_digest") == checkpoint.weights_digest
    record["answers"] = _answers(context, checkpoint, known.get("answers", {}) if same else {})
    context.barrier()
    if context.rank == 0:
        write_json(path, record)
    record = _with_tasks(context, checkpoint, record, path)
    context.barrier()
    return record


def _answers(context: Context, checkpoint: Checkpoint, known: dict[str, Any]) -> dict[str, Any]:
    """Loss on the held-out conversations of each training of the alignment, nats/token over their answers' tokens.

    None before an alignment, or of a model with another tokenizer. What is in `known` is not measured again.
    """
    aligned = context.stage_dir("align") / "checkpoint"
    tokenizer: str | None = context.share(
        digest_files(tokenizer_files(aligned)) if context.rank == 0 and is_current(context, "align") else None)
    found: dict[str, Any] = {}
    if tokenizer != checkpoint.tokenizer_digest:
        return found
    for number, phase in enumerate(align_phases(context.config)):
        tuned = phase_context(context, number)
        prepared = prepared_data(tuned, aligned, checkpoint.arch)
        key = {"data_digest": prepared.digest, "seq_length": phase.seq_length}
        measured = known.get(phase.name, {})
        if not measured.items() >= key.items():
            loss = _loss(tuned, checkpoint, prepared)
            measured = key | {"loss": loss["loss"], "num_tokens": loss["num_tokens"]}
        found[phase.name] = measured
    return found


def _with_tasks(context: Context, checkpoint: Checkpoint, record: dict[str, Any], path: Path) -> dict[str, Any]:
    """`record` with `tasks`: the scores of the recipe's tasks by name; `measured` keeps all that ever were."""
    evaluate, seed = context.config.evaluate, context.config.seed
    keys: dict[str, str] = context.share({
        task.name: digest_json([task_key(task, evaluate, seed), checkpoint.weights_digest, checkpoint.tokenizer_digest])
        for task in evaluate.tasks} if context.rank == 0 else None)
    due = [task for task in evaluate.tasks if keys[task.name] not in record["measured"]]
    if due:
        layout = dataclasses.replace(context.layout, sequence_parallel=False)
        model = load_model(checkpoint.arch, checkpoint.path, transformer_config(checkpoint.arch, layout))
        live = LiveModel(model=model, tokenizer=load_tokenizer(checkpoint.path), layout=layout, rank=context.rank,
                         share=context.share, micro_batch_size=evaluate.micro_batch_size,
                         chunk_tokens=context.config.train.chunk_tokens)
        if context.rank:
            live.follow()
        else:
            with live.directing():
                for task in due:
                    record["measured"][keys[task.name]] = run_task(live, task, evaluate, seed=seed)
                    write_json(path, record)
    tasks = {}
    for task in evaluate.tasks if context.rank == 0 else []:
        for row, scores in record["measured"][keys[task.name]].items():
            shown = task.metric if task.metric in scores["metrics"] else next(iter(scores["metrics"]))
            tasks[row] = {**scores, "metric": shown}
    if context.rank == 0:
        record["tasks"] = tasks
        write_json(path, record)
    shared: dict[str, Any] = context.share(record)
    return shared


def _loss(context: Context, checkpoint: Checkpoint, prepared: RecipeData) -> dict[str, Any]:
    """Loss in nats/token over every predicted held-out token, and in bits per byte of the held-out text."""
    model = load_model(checkpoint.arch, checkpoint.path, transformer_config(checkpoint.arch, context.layout),
                       layout=context.layout)
    samples = split_samples(context, prepared, "heldout", checkpoint.arch)
    result = heldout_loss(model, samples, layout=context.layout,
                          micro_batch_size=context.config.evaluate.micro_batch_size,
                          chunk_tokens=context.config.train.chunk_tokens)
    num_bytes = prepared.num_heldout_bytes
    bits = None if num_bytes is None else result.nats / math.log(2) / num_bytes
    return {"loss": result.loss, "num_tokens": result.num_tokens, "num_bytes": num_bytes, "bits_per_byte": bits}
