"""Stage `search`: every candidate is pruned from the same scores and distilled for a while; the best is chosen.

arXiv:2407.14679, section 3 (lightweight neural architecture search). A candidate's stages are ordinary ones, in
`search/CANDIDATE/STAGE`, so that a search that was killed goes on with the candidate and the step it was at. The stage
trains what is missing, one candidate after another in the same processes, each on all ranks, and ranks them. Jobs of
their own (`side_by_side`, or tasks of a Slurm job array) may have trained them before: `train`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nemo_minitron.artifacts import Candidate, read_json, write_json
from nemo_minitron.errors import UserError
from nemo_minitron.evaluate.loss import heldout_loss
from nemo_minitron.launch import locks
from nemo_minitron.model.build import load_model, transformer_config
from nemo_minitron.search import ranking
from nemo_minitron.stages.candidates import Candidates, candidates_in, curve, has_reached
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.data import prepared_data, split_samples
from nemo_minitron.stages.execute import execute
from nemo_minitron.stages.registry import due_stages
from nemo_minitron.stages.targets import sizes_of


def run(context: Context) -> dict[str, Any]:
    """Write `ranking.json`; every rank takes part."""
    candidates = _checked(context)
    context.say(f"[search] {len(candidates.archs)} candidates of {candidates.num_combinations} combinations")
    present, measured, rungs = list(candidates.archs), {}, []
    for rung, end in enumerate(candidates.ends):
        for name in present:
            measured[name] = _advance(candidates, name, rung)
        losses = [measured[name].loss for name in present]
        last = end == candidates.ends[-1]
        kept = present if last else [present[i] for i in ranking.survivors(losses, candidates.keep)]
        rungs.append({"step": end, "candidates": present, "kept": kept})
        present = kept
    return _choose(context, list(measured.values()), rungs)


def train(context: Context, names: list[str], rung: int) -> None:
    """Bring the candidates `names` to the end of a rung (from 0), as far as they are not there; every rank takes part.

    Nothing else of the search is done or written. Other jobs may train other candidates at the same time.
    """
    candidates = _checked(context)
    for name in names:
        _advance(candidates, name, rung)


def _checked(context: Context) -> Candidates:
    candidates = candidates_in(context)
    for arch in candidates.archs.values():
        context.layout.check(arch, name="candidate", seq_length=context.config.data.seq_length)
    return candidates


def _choose(context: Context, measured: list[Candidate], rungs: list[dict[str, Any]]) -> dict[str, Any]:
    order = ranking.ranked(measured)
    first, before = order[0], ranking.best_after_pruning(measured)
    rows = ranking.stability(order)
    record = {"chosen": ranking.as_dict(first), "best_after_pruning": ranking.as_dict(before),
              "candidates": [ranking.as_dict(one) for one in order], "stability": rows,
              "safe_step": ranking.safe_step(rows), "rungs": rungs,
              "heldout_samples": context.config.train.eval_samples}
    if context.rank == 0:
        write_json(context.stage_dir("search") / "ranking.json", record)
    context.barrier()
    context.say(f"[search] chosen: {first.name}, held-out {first.loss:.4f} nats/token after {first.step} steps "
                f"(right after pruning {first.pruned_loss:.4f}; {before.name} was best then)")
    return {"num_candidates": len(order), "chosen": first.name, "best_after_pruning": before.name,
            "losses": {one.name: one.loss for one in order}, "steps": first.step}


def _advance(candidates: Candidates, name: str, rung: int) -> Candidate:
    """Prune the candidate, measure it, and distil it up to the end of a rung, as far as that is not done."""
    context, end, last = candidates.contexts[name], candidates.ends[rung], rung == len(candidates.ends) - 1
    with _alone(context):
        due = _due(context)
        if "prune" in due:
            execute(context, ["prune"])
        pruned_loss = _pruned_loss(context)
        if "distill" in due and (last or not context.share(has_reached(context, end) if context.rank == 0 else None)):
            execute(dataclasses.replace(context, pause_step=None if last else end), ["distill"])
        looks = context.share(curve(context, end) if context.rank == 0 else None)
    manifest = context.manifest("distill")
    arch = candidates.archs[name]
    return Candidate(name=name, arch=arch, sizes=sizes_of(arch), pruned_loss=pruned_loss, curve=looks,
                     seconds=None if manifest is None else manifest.result["seconds"])


@contextmanager
def _alone(context: Context) -> Iterator[None]:
    """Keep other jobs out of a candidate's folder for as long as this job works in it; every rank must enter.

    Raises:
        UserError: another one has been in there for a minute.
    """
    if context.rank != 0:
        context.barrier()
        yield
        return
    context.round_dir.mkdir(parents=True, exist_ok=True)
    with open(context.round_dir / ".lock", "w") as file:
        locks.take(file, UserError("another job works on this candidate", found="a held lock", key="name",
                                   expected=f"nobody else in {context.round_dir}"))
        context.barrier()
        yield


def _due(context: Context) -> list[str]:
    due: list[str] = context.share(due_stages(context) if context.rank == 0 else None)
    return due


def _pruned_loss(context: Context) -> float:
    """Held-out loss before any training, nats/token, on the samples that looks on the way are at."""
    config = context.config
    student = context.student()
    prepared = prepared_data(context, student.path, student.arch)
    key = {"weights_digest": student.weights_digest, "data_digest": prepared.digest,
           "seq_length": config.data.seq_length, "samples": config.train.eval_samples}
    path = context.stage_dir("prune") / "loss.json"
    known = read_json(path) if path.exists() else {}
    found: dict[str, Any] | None = context.share(known if known.items() >= key.items() else None)
    if found is None:
        model = load_model(student.arch, student.path, transformer_config(student.arch, context.layout))
        result = heldout_loss(model, split_samples(context, prepared, "heldout", student.arch), layout=context.layout,
                              micro_batch_size=config.evaluate.micro_batch_size,
                              max_samples=config.train.eval_samples, chunk_tokens=config.train.chunk_tokens)
        found = {**key, "loss": result.loss}
        context.barrier()
        if context.rank == 0:
            write_json(path, found)
    context.say(f"[search] {context.part.rpartition('/')[2]}: held-out {found['loss']:.4f} nats/token after pruning")
    return float(found["loss"])
