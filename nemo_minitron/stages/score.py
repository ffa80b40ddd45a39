"""Stage `score`: importance of every prunable unit of the teacher, from forward passes or from its weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Checkpoint
from nemo_minitron.data.batch import Samples
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.evaluate.choices import encode_options
from nemo_minitron.evaluate.questions import read_questions
from nemo_minitron.importance.baselines import magnitude, random_importance
from nemo_minitron.importance.depth import scan_depth
from nemo_minitron.importance.hooks import collect_scores
from nemo_minitron.importance.iterative import Survival, sizes_after
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model.build import load_model, transformer_config
from nemo_minitron.prune.plan import make_plan
from nemo_minitron.prune.surgery import prune_checkpoint
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.data import prepared_data, split_samples
from nemo_minitron.stages.targets import how_to_rank, resolved_target


def run(context: Context) -> dict[str, Any]:
    """Write `scores.safetensors` and `scores.json`; every rank takes part."""
    config = context.config
    teacher = context.source_model()
    if config.importance.method != "activations":
        return _without_data(context, teacher)
    prepared = prepared_data(context, teacher.path, teacher.arch)
    samples = split_samples(context, prepared, "calibration", teacher.arch)
    ids = samples.calibration_ids(config.importance.num_samples, config.seed)
    context.layout.check(teacher.arch, name="teacher", seq_length=config.data.seq_length)
    scores = _collect(context, teacher, teacher.arch, teacher.path, samples, ids)
    facts: dict[str, Any] = {}
    if config.importance.depth.metrics or config.importance.depth.iterative:
        scores, facts = _with_depth(context, teacher, scores, samples)
    if config.importance.iterations > 1:
        scores = _iterate(context, teacher, scores, samples, ids)
    if context.rank == 0:
        scores.save(context.stage_dir("score"))
    context.say(f"[score] {len(ids)} samples of {config.data.seq_length} tokens; axes {', '.join(scores.axes())}")
    return {"scores_digest": scores.digest(), "num_samples": len(ids), "data_digest": prepared.digest,
            "tokens": len(ids) * config.data.seq_length, **facts}


def _without_data(context: Context, teacher: Checkpoint) -> dict[str, Any]:
    """The baselines: the norms of the weights, or numbers drawn at random."""
    method = context.config.importance.method
    if context.rank:
        return {}
    tensors = magnitude(teacher.path, teacher.arch) if method == "magnitude" \
        else random_importance(teacher.arch, context.config.seed)
    measures = {axis: {"magnitude": "L2 norm of a unit's weights", "random": "uniform random numbers"}[method]
                for axis in ("hidden", "ffn", "heads", "groups", "layers")}
    scores = Scores(source=teacher.arch, num_samples=1, samples_digest="", source_digest=teacher.weights_digest,
                    measures=measures, tensors=tensors)
    scores.save(context.stage_dir("score"))
    context.say(f"[score] {method}; axes {', '.join(scores.axes())}")
    return {"scores_digest": scores.digest(), "num_samples": 0, "tokens": 0}


def _collect(context: Context, teacher: Checkpoint, arch: ArchSpec, path: Path, samples: Samples,
             ids: np.ndarray) -> Scores:
    """One pass over `ids` with the model in `path`, the teacher or what is left of it."""
    config = context.config.importance
    model = load_model(arch, path, transformer_config(arch, context.layout), layout=context.layout,
                       unfused_norms=True)
    return collect_scores(model, samples, ids, layout=context.layout, source_digest=teacher.weights_digest,
                          micro_batch_size=config.micro_batch_size, neurons=config.neurons, heads=config.heads)


def _with_depth(context: Context, teacher: Checkpoint, scores: Scores,
                samples: Samples) -> tuple[Scores, dict[str, Any]]:
    """Add what dropping layers does to the model, and how many layer forwards that took."""
    config = context.config
    depth = config.importance.depth
    ids = samples.calibration_ids(depth.num_samples, config.seed)
    questions = [] if depth.task is None or "accuracy" not in depth.metrics else read_questions(Path(depth.task))
    options = encode_options(questions, load_tokenizer(teacher.path), config.data.seq_length) if questions else []
    model = load_model(teacher.arch, teacher.path, transformer_config(teacher.arch, context.layout),
                       layout=context.layout)
    scan = scan_depth(model, samples, ids, layout=context.layout, micro_batch_size=config.importance.micro_batch_size,
                      metrics=depth.metrics, block_lengths=depth.block_lengths, iterative=depth.iterative,
                      questions=questions, options=options, chunk_tokens=config.train.chunk_tokens, say=context.say)
    tensors = {**scores.tensors, **scan.tensors}
    return dataclasses.replace(scores, tensors=tensors), {"layer_forwards": scan.layer_forwards,
                                                          "naive_layer_forwards": scan.naive_layer_forwards}


def _iterate(context: Context, teacher: Checkpoint, scores: Scores, samples: Samples,
             ids: np.ndarray) -> Scores:
    """Cut towards the target in steps and score again after each; the first step's `scores` are there."""
    config = context.config
    target = resolved_target(teacher.arch, config.prune)
    how = dataclasses.replace(how_to_rank(config.importance), method="activations")
    steps, survival, present, path = config.importance.iterations, Survival(teacher.arch), scores, teacher.path
    for step in range(steps):
        sizes = sizes_after(step, steps, teacher.arch, target, dataclasses.asdict(config.prune.divisors))
        plan = make_plan(present.source, sizes, present, ranking=how)
        survival.add(present, plan, how)
        if step == steps - 1:
            break
        smaller = context.stage_dir("score") / "steps" / str(step + 1)
        if context.rank == 0:
            prune_checkpoint(path, plan, smaller)
        context.barrier()
        context.layout.check(plan.target, name=f"model after step {step + 1} of {steps}")
        path, present = smaller, _collect(context, teacher, plan.target, smaller, samples, ids)
        context.say(f"[score] step {step + 1}/{steps}: scored again at hidden {plan.target.hidden_size}, "
                    f"FFN {plan.target.ffn_hidden_size}, {plan.target.num_layers} layers")
    context.barrier()
    if context.rank == 0:
        shutil.rmtree(context.stage_dir("score") / "steps", ignore_errors=True)
    return dataclasses.replace(scores, tensors={**scores.tensors, **survival.tensors()})
