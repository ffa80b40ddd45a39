"""What a resume point costs the training it interrupts: written beside the steps, and in between.

    python benchmarks/checkpoints.py --turns 3

Trains random weights of about 60 M parameters (fp32 with Adam: about 0.7 GB a point) on the embedded corpus, one
thread, three ways in turn: no points, a point every `--every` steps written in between
(`train.checkpoint_async=false`), and the same written beside the steps (the default). Prints JSON: seconds a step of
each (median over the turns), what a point adds to the training in seconds either way, and their ratio. A point on its
way is waited for where the next one is due, so `--every` steps must last longer than writing it. The machine needs a
second core, as a node with GPUs has: with none left the writing slows the steps down by what it takes itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

OUTPUT = Path("outputs/benchmarks/checkpoints")
MODEL = ["model.num_layers=8", "model.hidden_size=768", "model.ffn_hidden_size=2048", "model.num_attention_heads=12",
         "model.num_query_groups=12", "model.head_dim=64"]
WAYS = {"none": ["train.checkpoint_every_steps=100000"], "between": ["train.checkpoint_async=false"],
        "beside": ["train.checkpoint_async=true"]}


def seconds_a_step(way: str, *, steps: int, every: int) -> float:
    """Train `steps` steps and return the mean of all but the first."""
    shutil.rmtree(OUTPUT / way, ignore_errors=True)
    command = [sys.executable, "-m", "nemo_minitron.cli", "experiment=demo_teacher", "stages=[initialize,correct]",
               *MODEL, "train.precision=32", "train.global_batch_size=2", "train.micro_batch_size=2",
               "train.eval_every_steps=0", "train.log_every_steps=1", "parallel.num_threads=1",
               f"correct.tokens={steps * 2 * 256}", "optim.warmup_steps=1",
               f"train.checkpoint_every_steps={every}", *WAYS[way], f"output_dir={OUTPUT}", f"name={way}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = (OUTPUT / way / "round1/correct/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    total = [json.loads(line)["seconds"] for line in lines]
    assert len(total) == steps
    return float((total[-1] - total[0]) / (steps - 1))


def main() -> None:
    """Measure, print and write `checkpoints.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--every", type=int, default=6)
    options = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.turns):
        for way in WAYS:
            found[way].append(seconds_a_step(way, steps=options.steps, every=options.every))
    step = {way: statistics.median(times) for way, times in found.items()}
    points = (options.steps - 1) // options.every
    cost = {way: (step[way] - step["none"]) * (options.steps - 1) / points for way in ("between", "beside")}
    sizes = [path.stat().st_size for path in (OUTPUT / "beside").glob("round1/correct/resume/*/*")]
    kept = len(list((OUTPUT / "beside").glob("round1/correct/resume/step_*")))
    record = {"seconds_a_step": step, "turns": found, "points": points, "point_bytes": sum(sizes) // max(kept, 1),
              "seconds_a_point": cost, "beside_over_between": cost["beside"] / cost["between"]}
    (OUTPUT / "checkpoints.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
