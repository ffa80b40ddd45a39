"""`summary.json`: the numbers that other people's scripts read; losses in nats/token on the same held-out tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoint.families import read_arch

MODELS = {"pruned": "prune", "distilled": "distill", "ce": "ce", "scratch": "scratch",
          "scratch_until": "scratch_until", "aligned": "align"}
"""Name of each model in the summary -> the stage that made it; the teacher comes first."""


def summarize(*, round_name: str, teacher_path: Path, round_dir: Path,
              manifests: Mapping[str, Manifest | None], evaluated: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Assemble the summary of one round; what was not run is null, controls not run are absent.

    recovery = (pruned - distilled) / (pruned - teacher); excess = distilled - teacher, nats/token;
    excess_vs_scratch = excess / (scratch - teacher) at equal training tokens. `controls.scratch_until` has also
    `token_ratio`, its training tokens over those of the distillation, and whether it `reached` that loss. Each model's
    `tasks`, there where the recipe has some, are its scores by name of the task: all metrics, and under `metric` which
    of them to show. `aligned` and every model's `answers`, the loss on each training's held-out answers (nats/token,
    and of how many), are there after an alignment.
    """
    models = {"teacher": _model(teacher_path, manifests.get("correct"), evaluated["teacher"])}
    for model, stage in MODELS.items():
        if model in evaluated:
            models[model] = _model(round_dir / stage / "checkpoint", manifests[stage], evaluated[model])
    loss = {model: entry["loss"] for model, entry in models.items()}
    entry: dict[str, Any] = {
        "name": round_name,
        **{model: models.get(model) for model in ("teacher", "pruned", "distilled")},
        "controls": {model: models[model] for model in ("scratch", "ce", "scratch_until") if model in models},
        "recovery": None, "excess": None, "excess_vs_scratch": None,
    }
    until = manifests.get("scratch_until")
    if "scratch_until" in models and until is not None:
        models["scratch_until"] |= {name: until.result[name] for name in ("token_ratio", "reached")}
    if "aligned" in models:
        entry["aligned"] = models["aligned"]
    if "distilled" in loss:
        entry["recovery"] = _ratio(loss["pruned"] - loss["distilled"], loss["pruned"] - loss["teacher"])
        entry["excess"] = loss["distilled"] - loss["teacher"]
        if "scratch" in loss:
            entry["excess_vs_scratch"] = _ratio(entry["excess"], loss["scratch"] - loss["teacher"])
    return entry


def searched(ranking: Mapping[str, Any], distilled: Mapping[str, Any] | None,
             compared: Manifest | None) -> dict[str, Any]:
    """What a round's search found; `compared` has both losses after equal distillation, where that was run.

    Losses of candidates are nats/token on `heldout_samples` samples, those of `compared` on all held-out tokens.
    """
    names = ("name", "pruned_loss", "loss", "step", "num_parameters", "num_non_embedding_parameters")
    found: dict[str, Any] = {
        "chosen": ranking["chosen"]["name"], "best_after_pruning": ranking["best_after_pruning"]["name"],
        "safe_step": ranking["safe_step"], "heldout_samples": ranking["heldout_samples"],
        "candidates": [{name: one[name] for name in names} for one in ranking["candidates"]], "compared": None}
    if compared is not None:
        own = None if distilled is None else distilled["loss"]
        other = compared.result["loss"]
        found["compared"] = {"chosen": own, "best_after_pruning": own if other is None else other,
                             "same_candidate": other is None}
    return found


def _model(path: Path, manifest: Manifest | None, record: Mapping[str, Any]) -> dict[str, Any]:
    arch: ArchSpec = read_arch(path)
    result = {} if manifest is None else manifest.result
    return {"path": str(path), "loss": record["loss"], "bits_per_byte": record["bits_per_byte"],
            "num_parameters": arch.num_parameters(),
            "num_non_embedding_parameters": arch.num_non_embedding_parameters(),
            **{key: result.get(key) for key in ("tokens", "seconds", "tokens_per_s")},
            **({"answers": {name: {key: found[key] for key in ("loss", "num_tokens")}
                            for name, found in record["answers"].items()}} if record.get("answers") else {}),
            **({"tasks": record["tasks"]} if record.get("tasks") else {})}


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
