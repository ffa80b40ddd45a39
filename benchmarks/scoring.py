"""What collecting importance costs, against a plain forward of the same model on the same samples.

    python benchmarks/scoring.py            (or: make bench-scoring)

`collect_scores` measures all axes (hidden, FFN, heads and groups, block influence) with what all nine aggregations
need, in one pass; it needs no LM head. The plain forward has the same model, samples, micro-batches and schedule and
multiplies by the LM head, 256 tokens at a time. After a warm-up both take turns in one process; seconds are medians.
Memory is the peak resident size of a fresh process that builds the model and does one or the other, above what the
process held before it built the model (so that hundreds of MB of imported libraries do not hide a difference), with
glibc told to give freed blocks back at once (its own thresholds move the figure by 20 MB from run to run).

It prints a table and writes JSON: `time_over_forward` and `memory_over_forward` are the worst of all cases. Where
ModelOpt is installed (the extra `bench`), `scoring_modelopt` runs in the same process: see there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from depth_scan import LAYOUT, random_model, random_samples  # opens the CPU door

# isort: split
import numpy as np
import scoring_modelopt
import torch
import torch.distributed as dist

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import write_json
from nemo_minitron.evaluate.loss import padded_batch
from nemo_minitron.importance.hooks import collect_scores
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import cuda_is_available
from nemo_minitron.parallel.schedule import forward_only

SAMPLES, SEQ_LENGTH, MICRO_BATCH = 64, 256, 8
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CASES = {
    "hidden 256, 8 layers, vocabulary 2048": ArchSpec(
        family="llama", num_layers=8, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, num_query_groups=4,
        head_dim=32, vocab_size=2048),
    "hidden 256, 8 layers, vocabulary 32000": ArchSpec(
        family="llama", num_layers=8, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, num_query_groups=4,
        head_dim=32, vocab_size=32000),
}


def both(arch: ArchSpec, directory: Path) -> dict[str, Callable[[], object]]:
    """The two things that are compared, on one model."""
    model = random_model(arch)
    samples = random_samples(directory, arch, SAMPLES + 1, SEQ_LENGTH)
    ids = np.arange(SAMPLES)
    head = model.head()

    def multiply(hidden: torch.Tensor, batch: object) -> float:
        rows = hidden.reshape(-1, hidden.size(-1))
        return sum(float((rows[first : first + 256] @ head.t())[0, 0]) for first in range(0, len(rows), 256))

    def forward() -> object:
        batches = (padded_batch(samples, part, MICRO_BATCH) for part in np.split(ids, SAMPLES // MICRO_BATCH))
        return forward_only(model, batches, num_microbatches=SAMPLES // MICRO_BATCH, consume=multiply)

    def score() -> object:
        return collect_scores(model, samples, ids, layout=LAYOUT, micro_batch_size=MICRO_BATCH, source_digest="")

    return {"forward": forward, "score": score}


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_bytes(which: str, name: str) -> int:
    """Of a process of its own that runs `which`."""
    child = subprocess.run([sys.executable, __file__, "--child", which, name], check=True, capture_output=True,
                           text=True, env=os.environ | GIVE_BACK)
    return int(child.stdout.split()[-1])


def measure(name: str, arch: ArchSpec, turns: int) -> dict[str, float | list[float]]:
    """Seconds of both in turn, and peak bytes of each in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        runs = both(arch, Path(directory))
        for run in runs.values():
            run()
        taken = [{which: seconds(run) for which, run in runs.items()} for _ in range(turns)]
    middle = {which: statistics.median(turn[which] for turn in taken) for which in runs}
    peak = {which: peak_bytes(which, name) for which in runs}
    return {"time_over_forward": middle["score"] / middle["forward"],
            "memory_over_forward": peak["score"] / peak["forward"],
            **{f"{which}_seconds": middle[which] for which in runs},
            "time_ratio_of_turns": [turn["score"] / turn["forward"] for turn in taken],
            **{f"{which}_peak_bytes": peak[which] for which in runs}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/scoring.json"), help="the JSON file")
    parser.add_argument("--child", nargs=2, metavar=("WHICH", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("nccl" if cuda_is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups.start(LAYOUT, timeout_s=600)
    groups.seed_everything(1)
    if arguments.child:
        which, name = arguments.child
        before = resident_bytes("VmRSS")
        with tempfile.TemporaryDirectory() as directory:
            run = both(CASES[name], Path(directory))[which]
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far may be the imports', or the parent's
            run()
        print(resident_bytes("VmHWM") - before)
        return
    cases = {name: measure(name, arch, arguments.turns) for name, arch in CASES.items()}
    print(f"{'case':40}{'forward s':>11}{'score s':>10}{'time':>8}{'memory':>9}")
    for name, case in cases.items():
        print(f"{name:40}{case['forward_seconds']:11.3f}{case['score_seconds']:10.3f}"
              f"{case['time_over_forward']:8.3f}{case['memory_over_forward']:9.3f}")
    worst = {key: max(case[key] for case in cases.values()) for key in ("time_over_forward", "memory_over_forward")}
    print(json.dumps(worst))
    peer = None
    if scoring_modelopt.is_installed():
        peer = scoring_modelopt.compare(arguments.turns)
        scoring_modelopt.show(peer)
    else:
        print("ModelOpt is not installed: pip install -e '.[bench]' -c constraints.txt")
    write_json(arguments.out, {
        **worst, "modelopt": peer, "cases": cases, "threads": arguments.threads, "machine": platform.machine(),
        "samples": SAMPLES, "seq_length": SEQ_LENGTH, "micro_batch_size": MICRO_BATCH})


if __name__ == "__main__":
    main()
