"""A recipe killed with SIGKILL again and again, against the same recipe undisturbed: every loss must be equal.

    python benchmarks/kills.py --kills 10 --seed 1 experiment=demo_search

Runs `minitron ARGS` to its end in `outputs/kills/undisturbed`, then in `outputs/kills/killed`, where the command and
all that it started are killed after a random time, started again, and so on; after the last kill it runs to its end.
The seed and each time are printed. A time is drawn between the start of the command and `--longest` seconds, so that
kills fall into the start of processes, stages, checkpoints and the moments between. Compared are all values under keys
with `loss` in their name in the two files `summary.json`, and in the rankings of searches, bit by bit. Exit code 1 when
one differs, or when the recipe was done before the last kill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import write_json


def command(arguments: list[str], output_dir: Path) -> list[str]:
    """The command of one run."""
    return [sys.executable, "-m", "nemo_minitron.cli", *arguments, f"output_dir={output_dir}", "name=run"]


def kill_after(arguments: list[str], output_dir: Path, seconds: float, log: Any) -> bool:
    """Start the command and kill it with its whole session after `seconds`; False when it had ended before."""
    process = subprocess.Popen(command(arguments, output_dir), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                               start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        for pid in reversed(tree(process.pid)):  # ranks have sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        return True
    if code:
        raise SystemExit(f"the command ended by itself with exit code {code}: see {log.name}")
    return False


def tree(pid: int) -> list[int]:
    """Process ids of `pid` and of all that it started, parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8")
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def losses(record: Any, path: str = "") -> dict[str, Any]:
    """Every value under a key with `loss` in its name, by the path to it."""
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    found: dict[str, Any] = {}
    for key, value in items:
        where = f"{path}.{key}"
        if "loss" in str(key) or str(key) == "curve":
            found[where] = value
        else:
            found |= losses(value, where)
    return found


def all_losses(run_dir: Path) -> dict[str, Any]:
    """Of the summary, and of each round's ranking."""
    found: dict[str, Any] = {}
    for file in (run_dir / "summary.json", *sorted(run_dir.glob("*/search/ranking.json"))):
        found |= losses(json.loads(file.read_text(encoding="utf-8")), str(file.relative_to(run_dir)))
    return found


def main() -> None:
    """Run both, compare, and write `outputs/kills/kills.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=float, default=90.0, help="seconds before a kill, at most")
    parser.add_argument("--undisturbed", type=Path, help="directory of a finished run of the same recipe")
    parser.add_argument("--out", type=Path, default=Path("outputs/kills"))
    parser.add_argument("arguments", nargs="*", default=["experiment=demo_search"], help="overrides of the recipe")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    undisturbed = options.undisturbed or options.out / "undisturbed" / "run"
    draw = random.Random(options.seed)
    times = [round(draw.uniform(0.0, options.longest), 1) for _ in range(options.kills)]
    print(f"seed {options.seed}: kills after {times} s", flush=True)
    with (options.out / "log.txt").open("a") as log:
        if options.undisturbed is None:
            subprocess.run(command(options.arguments, undisturbed.parent), stdout=log, stderr=log, check=True)
        for count, seconds in enumerate(times, 1):
            if not kill_after(options.arguments, options.out / "killed", seconds, log):
                raise SystemExit(f"the recipe was done before kill {count}: take a smaller --longest")
            print(f"kill {count} after {seconds} s", flush=True)
        started = time.monotonic()
        subprocess.run(command(options.arguments, options.out / "killed"), stdout=log, stderr=log, check=True)
    expected, found = all_losses(undisturbed), all_losses(options.out / "killed" / "run")
    different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    record = {"arguments": options.arguments, "seed": options.seed, "kills_after_s": times, "num_losses": len(expected),
              "different": different, "last_run_s": round(time.monotonic() - started, 1)}
    write_json(options.out / "kills.json", record)
    print(json.dumps(record, indent=2))
    if different or not expected:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
