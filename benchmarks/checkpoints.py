"""What a resume point costs the training it interrupts: written beside the steps, and in between.

    python benchmarks/checkpoints.py --turns 3

Trains random weights of about 60 M parameters (fp32 with Adam: about 0.7 GB a point) on the embedded corpus, one
thread, three ways in turn: no points, a point every `--every` steps for which training waits
(`train.checkpoint_async=false`), and the same written beside the steps (the default). It prints a table and writes
JSON: `beside_over_between` is what a point written beside the steps adds to the training over what it adds in between,
seconds over seconds (median over the turns). A point on its way is waited for where the next one is due, so `--every`
steps must last longer than writing it. The machine needs a second core, as a node with GPUs has: with none left the
writing slows the steps down by what it takes itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from nemo_minitron.artifacts import write_json
from nemo_minitron.training.resume import sealed_points

RUNS = Path("outputs/benchmarks/checkpoints")
MODEL = ["model.num_layers=8", "model.hidden_size=768", "model.ffn_hidden_size=2048", "model.num_attention_heads=12",
         "model.num_query_groups=12", "model.head_dim=64"]
WAYS = {"none": ["train.checkpoint_every_steps=100000"], "between": ["train.checkpoint_async=false"],
        "beside": ["train.checkpoint_async=true"]}


def measure(way: str, *, steps: int, every: int) -> tuple[float, int]:
    """Train `steps` steps; returns the mean seconds of all but the first, and the bytes of a resume point (0: none)."""
    shutil.rmtree(RUNS / way, ignore_errors=True)
    command = [sys.executable, "-m", "nemo_minitron.cli", "experiment=demo_teacher", "stages=[initialize,correct]",
               *MODEL, "train.precision=32", "train.global_batch_size=2", "train.micro_batch_size=2",
               "train.eval_every_steps=0", "train.log_every_steps=1", "parallel.num_threads=1",
               f"correct.tokens={steps * 2 * 256}", "optim.warmup_steps=1",
               f"train.checkpoint_every_steps={every}", *WAYS[way], f"output_dir={RUNS}", f"name={way}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    point_bytes = 0
    while process.poll() is None:
        for point in sealed_points(RUNS / way / "round1/correct/resume")[:1]:
            point_bytes = sum(size for size, _ in point.files.values())
        time.sleep(1.0)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    lines = (RUNS / way / "round1/correct/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    total = [json.loads(line)["seconds"] for line in lines]
    assert len(total) == steps
    return float((total[-1] - total[0]) / (steps - 1)), point_bytes


def main() -> None:
    """Measure, print and write `outputs/benchmarks/checkpoints.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RUNS.with_suffix(".json"))
    options = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    point_bytes = 0
    for _ in range(options.turns):
        for way in WAYS:
            seconds, size = measure(way, steps=options.steps, every=options.every)
            found[way].append(seconds)
            point_bytes = max(point_bytes, size)
    step = {way: statistics.median(times) for way, times in found.items()}
    points = (options.steps - 1) // options.every
    cost = {way: (step[way] - step["none"]) * (options.steps - 1) / points for way in ("between", "beside")}
    ratio = cost["beside"] / cost["between"]
    write_json(options.out, {"beside_over_between": ratio, "cases": {
        "seconds_a_step": found, "seconds_a_point": cost, "points": points, "point_bytes": point_bytes,
        "command": ["python", *sys.argv]}})
    print(f"{'points written':<18}{'s a step':>10}{'s a point':>11}")
    for way, seconds in step.items():
        print(f"{way:<18}{seconds:>10.3f}" + (f"{cost[way]:>11.2f}" if way in cost else ""))
    print(f"\n{points} points of {point_bytes / 1e9:.2f} GB\n{'beside_over_between':<22}{ratio:.3g}\n\n{options.out}")


if __name__ == "__main__":
    main()
