"""Which loss recovers a pruned model best: the tables of docs/distillation.md.

    python benchmarks/kd_ablation.py teacher.path=../shared/data/stories260K-hf data=stories \\
           data.path=../shared/data/tinystories-sample importance.num_samples=256 distill.tokens=400000 \\
           train.global_batch_size=16 optim.lr=0.004 optim.min_lr=4e-5 optim.warmup_steps=30 \\
           -- width prune.target.hidden_size=48 prune.target.ffn_hidden_size=120 -- depth prune.target.num_layers=3

Arguments up to the first `--` are the recipe; each `--` begins a name and the overrides of one target. Every variant is
a run of `minitron` of its own, with seeds 1, 2 and 3 (the order of the samples), `--workers` of them at a time with one
thread each, in `outputs/ablation`. Runs that are there are not repeated, so a killed command goes on; `--minutes` stops
it early, with what there is. Prints Markdown tables and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nemo_minitron.artifacts import write_json

VARIANTS = {
    "forward KL": ["distill.loss=kl"],
    "reverse KL": ["distill.loss=reverse_kl"],
    "Jensen-Shannon": ["distill.loss=js"],
    "MSE of logits": ["distill.loss=mse"],
    "cosine of logits": ["distill.loss=cosine"],
    "cross-entropy alone": ["distill.kd_weight=0", "distill.ce_weight=1"],
    "forward KL + cross-entropy": ["distill.loss=kl", "distill.ce_weight=1"],
    "temperature 0.5": ["distill.temperature=0.5"],
    "temperature 3": ["distill.temperature=3"],
    "top-k KL, k = 8": ["distill.loss=top_k_kl", "distill.top_k=8"],
    "top-k KL, k = 64": ["distill.loss=top_k_kl", "distill.top_k=64"],
}
SEEDS = (1, 2, 3)
OUTPUT = Path("outputs/ablation")


def run(target: str, variant: str, seed: int, arguments: list[str], deadline: float) -> float | None:
    """Held-out loss after distillation, nats/token; None where time ran out."""
    name = "-".join("".join(c if c.isalnum() else "_" for c in part) for part in (target, variant, str(seed)))
    summary = OUTPUT / name / "summary.json"
    if not summary.exists():
        if time.monotonic() > deadline:
            return None
        done = subprocess.run(
            [sys.executable, "-m", "nemo_minitron.cli", *arguments, f"name={name}", f"output_dir={OUTPUT}",
             f"seed={seed}", "parallel.num_threads=1", "train.eval_every_steps=0"],
            capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
    record = json.loads(summary.read_text())["rounds"][0]
    print(f"{target:8}{variant:30}seed {seed}  {record['distilled']['loss']:.4f}", flush=True)
    return float(record["distilled"]["loss"])


def table(target: str, losses: dict[str, list[float]]) -> str:
    """Mean and spread (largest minus smallest) over seeds, best first."""
    rows = sorted((statistics.mean(values), name, values) for name, values in losses.items() if values)
    lines = [f"| {target} | held-out loss | spread | seeds |", "|---|---|---|---|"]
    lines += [f"| {name} | {mean:.4f} | {max(values) - min(values):.4f} | {len(values)} |"
              for mean, name, values in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/kd_ablation.json"))
    own, rest = parser.parse_known_args([part for part in sys.argv[1:] if part != "--"])
    recipe, targets = [], {}
    for argument in rest:
        if "=" not in argument:
            targets[argument] = []
        elif targets:
            targets[list(targets)[-1]].append(argument)
        else:
            recipe.append(argument)
    deadline = time.monotonic() + 60 * own.minutes
    jobs = [(target, variant, seed) for seed in SEEDS for target in targets for variant in VARIANTS]
    with ThreadPoolExecutor(own.workers) as pool:
        found = list(pool.map(lambda job: run(*job, [*recipe, *targets[job[0]], *VARIANTS[job[1]]], deadline), jobs))
    losses: dict[str, dict[str, list[float]]] = {target: {variant: [] for variant in VARIANTS} for target in targets}
    for (target, variant, _), loss in zip(jobs, found, strict=True):
        if loss is not None:
            losses[target][variant].append(loss)
    for target in targets:
        print("\n" + table(target, losses[target]))
    write_json(own.out, {"recipe": recipe, "targets": targets, "cases": losses})


if __name__ == "__main__":
    main()
