"""Runs stages one after another in this process: on rank 0 with the bookkeeping, on the others without."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import time
from importlib import metadata
from typing import Any

from nemo_minitron.artifacts import Manifest, read_json, write_json
from nemo_minitron.launch import signals
from nemo_minitron.stages.context import ROUND, Context
from nemo_minitron.stages.registry import STAGES, fingerprint, input_digests, stage_config

_PACKAGES = ("nemo_minitron", "nemo_toolkit", "megatron-core", "torch", "lightning", "transformers", "numpy", "sympy")


def execute(context: Context, stages: list[str]) -> None:
    """Run `stages`, which are due, in order; every rank of a worker calls this with the same list."""
    for number, name in enumerate(stages):
        shown = name if context.part == ROUND else f"{context.part}/{name}"
        if number and (told := context.share(signals.requested() if context.rank == 0 else None)):
            raise signals.Stop(f"stopped by {told} before {shown}")  # it came after the last step of a training
        with context.inside(shown):
            _execute(context, name, shown)


def _execute(context: Context, name: str, shown: str) -> None:
    started = time.time()
    if context.rank == 0:
        print(f"== {shown}", flush=True)
        _enter(context, name)
    context.barrier()
    result: dict[str, Any] = {}
    if STAGES[name].ranks:
        result = STAGES[name].load()(context)
    elif context.rank == 0:
        result = STAGES[name].load()(dataclasses.replace(context, share=_alone, barrier=_nobody))
    context.barrier()
    if context.rank == 0 and not result.get("paused"):
        _finish(context, name, result, started)
    context.barrier()


def _alone(value: Any) -> Any:
    return value


def _nobody() -> None:
    """Nothing to wait for."""


def has_begun(context: Context, name: str) -> bool:
    """Whether what lies in the stage's directory belongs to today's inputs and configuration, finished or not."""
    inputs = input_digests(context, name)
    marker = context.stage_dir(name) / "started.json"
    known = read_json(marker).get("fingerprint") if marker.exists() else None
    return inputs is not None and known == fingerprint(context, name, inputs)


def _enter(context: Context, name: str) -> None:
    """Make the stage's directory, or empty it when what is in it belongs to other inputs."""
    inputs = input_digests(context, name)
    assert inputs is not None, f"{name} runs before its inputs"
    directory = context.stage_dir(name)
    marker = directory / "started.json"
    mark = {"fingerprint": fingerprint(context, name, inputs), "threads": _threads()}
    before = read_json(marker) if marker.exists() else {}
    goes_on = before.get("fingerprint") == mark["fingerprint"]
    # what says that files are whole goes before the files, or a kill in between would leave it behind alone
    (directory / "manifest.json").unlink(missing_ok=True)
    if directory.exists() and not goes_on and not STAGES[name].keeps_files:
        marker.unlink(missing_ok=True)
        shutil.rmtree(directory)
    trains = any(point.exists() for point in (directory / "resume", *directory.glob("*/resume")))  # or a part of it
    if goes_on and before.get("threads") != mark["threads"] and trains:
        context.say(f"[{name}] {mark['threads']} threads instead of {before.get('threads')}: the result will be equal "
                    f"to rounding, not to the bit (parallel.num_threads)")
    write_json(marker, mark)


def _finish(context: Context, name: str, result: dict[str, Any], started: float) -> None:
    inputs = input_digests(context, name)
    assert inputs is not None
    parallel = context.config.parallel
    Manifest(
        stage=name, fingerprint=fingerprint(context, name, inputs), inputs=inputs, config=stage_config(context, name),
        versions=versions(), result=result, times={"started": started, "seconds": round(time.time() - started, 3)},
        world={"tp": parallel.tp, "pp": parallel.pp, "dp": parallel.dp, "sequence_parallel": parallel.sequence_parallel,
               "world_size": int(os.environ.get("WORLD_SIZE", "1")) if STAGES[name].ranks else 1,
               "threads": _threads(), "command": context.command,
               "mkl_cbwr": os.environ.get("MKL_CBWR", ""), "machine": platform.machine()},
    ).write(context.stage_dir(name))
    shutil.rmtree(context.stage_dir(name) / "resume", ignore_errors=True)  # their checksums tell of a kill in between
    shutil.rmtree(context.stage_dir(name) / "best", ignore_errors=True)


def _threads() -> int:
    """CPU threads of each rank, on which the order of sums depends."""
    return int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
