"""Which loss recovers a pruned model best: the tables of docs/distillation.md.

    python benchmarks/kd_ablation.py teacher.path=../shared/data/stories260K-hf data=stories \\
           data.path=../shared/data/tinystories-sample importance.num_samples=256 distill.tokens=400000 \\
           train.global_batch_size=16 optim.lr=0.004 optim.min_lr=4e-5 optim.warmup_steps=30 \\
           -- width prune.target.hidden_size=40 prune.target.ffn_hidden_size=128 -- depth prune.target.num_layers=3

Arguments up to the first `--` are the recipe; each `--` begins a name and the overrides of one target. The teacher is
scored once; every variant is then a run of its own with seeds 1, 2 and 3 (the order of the samples), in
`outputs/ablation`. `--workers` processes of one thread each share them, and import what they need once. Runs that are
there are not repeated and a killed one goes on; `--minutes` stops early, with what there is. Prints Markdown tables and
writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.compose import load_config
from nemo_minitron.launch.workers import worker_environment
from nemo_minitron.pipeline import check_recipe
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.registry import due_stages

VARIANTS = {
    "forward KL": ["distill.loss=kl"],
    "reverse KL": ["distill.loss=reverse_kl"],
    "Jensen-Shannon": ["distill.loss=js"],
    "MSE of logits": ["distill.loss=mse"],
    "cosine of logits": ["distill.loss=cosine"],
    "cross-entropy alone": ["distill.kd_weight=0", "distill.ce_weight=1"],
    "forward KL + cross-entropy": ["distill.loss=kl", "distill.ce_weight=1"],
    "forward KL + hidden (last-2) + embedding": ["distill=depth"],
    "forward KL, temperature 0.5": ["distill.temperature=0.5"],
    "forward KL, temperature 3": ["distill.temperature=3"],
    "top-k KL, k = 8": ["distill.loss=top_k_kl", "distill.top_k=8"],
    "top-k KL, k = 64": ["distill.loss=top_k_kl", "distill.top_k=64"],
}
SEEDS = (1, 2, 3)
OUTPUT = Path("outputs/ablation")
SCORES = OUTPUT / "scores" / "round1" / "score"


def job_name(target: str, variant: str, seed: int) -> str:
    return "-".join("".join(c if c.isalnum() else "_" for c in part) for part in (target, variant, str(seed)))


def overrides(job: tuple[str, str, int], recipe: list[str], targets: dict[str, list[str]]) -> list[str]:
    target, variant, seed = job
    # the group's choice comes before the keys that change it
    return [*VARIANTS[variant], *recipe, *targets[target], f"name={job_name(*job)}", f"output_dir={OUTPUT}",
            f"seed={seed}", f"prune.scores={SCORES}", "stages=[prune,distill,evaluate]", "parallel.num_threads=1",
            "train.eval_every_steps=0", "train.checkpoint_every_steps=1000"]


def loss_of(job: tuple[str, str, int]) -> float | None:
    """Held-out loss of a finished job, nats/token."""
    folder = OUTPUT / job_name(*job) / "round1" / "evaluate"
    return float(read_json(folder / "distilled.json")["loss"]) if (folder / "manifest.json").exists() else None


def work(jobs: list[list[str]], deadline: float) -> None:
    """In a worker process: run the recipes in turn, all in this process."""
    from nemo_minitron.parallel.cpu import open_cpu_door

    open_cpu_door()
    import torch

    from nemo_minitron.parallel import groups
    from nemo_minitron.stages.execute import execute
    from nemo_minitron.worker import _quieten

    _quieten()
    torch.set_num_threads(1)
    groups.start_alone()
    for arguments in jobs:
        if time.time() > deadline:
            return
        context = Context(config=load_config(arguments), command="benchmarks/kd_ablation.py")
        check_recipe(context)
        context.config.run_dir.mkdir(parents=True, exist_ok=True)
        with (context.config.run_dir / "log").open("a") as log, contextlib.redirect_stdout(log):
            groups.seed_everything(context.config.seed)
            execute(context, due_stages(context))
        print(context.config.name, flush=True)


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
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # of a worker
    own, rest = parser.parse_known_args([part for part in sys.argv[1:] if part != "--"])
    if own.job is not None:
        job = read_json(own.job)
        work(job["jobs"], job["deadline"])
        return
    recipe: list[str] = []
    targets: dict[str, list[str]] = {}
    for argument in rest:
        if "=" not in argument:
            targets[argument] = []
        elif targets:
            targets[list(targets)[-1]].append(argument)
        else:
            recipe.append(argument)
    jobs = [(target, variant, seed) for seed in SEEDS for target in targets for variant in VARIANTS]
    scoring = [*recipe, "name=scores", f"output_dir={OUTPUT}", "stages=[score]", "parallel.num_threads=1"]
    environment = worker_environment(load_config(scoring), 1) | {"CUDA_VISIBLE_DEVICES": ""}
    deadline = time.time() + 60 * own.minutes

    def start(number: int, todo: list[list[str]]) -> subprocess.Popen[bytes]:
        path = OUTPUT / f"worker_{number}.json"
        write_json(path, {"jobs": todo, "deadline": deadline})
        return subprocess.Popen([sys.executable, __file__, "--job", str(path)], env=os.environ | environment)

    if not (SCORES / "manifest.json").exists() and start(0, [scoring]).wait():
        raise SystemExit("scoring failed")
    due = [overrides(job, recipe, targets) for job in jobs if loss_of(job) is None]
    workers = [start(number, due[number :: own.workers]) for number in range(own.workers)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit("a worker failed; the same command goes on from here")
    losses: dict[str, dict[str, list[float]]] = {target: {variant: [] for variant in VARIANTS} for target in targets}
    for target, variant, seed in jobs:
        if (loss := loss_of((target, variant, seed))) is not None:
            losses[target][variant].append(loss)
    for target in targets:
        print("\n" + table(target, losses[target]))
    write_json(own.out, {"recipe": recipe, "targets": targets, "cases": losses})


if __name__ == "__main__":
    main()
