"""One lab for all tests of a session, and the tiny recipe on two nodes of two ranks: TP inside a node, DP across."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.lab.lab import Lab, install, why_not
from tests.e2e.command import ROOT, Inputs
from tests.e2e.conftest import inputs  # noqa: F401  a fixture

CHECKPOINT_EVERY = 20
RECIPE = {"cluster": "small_lab", "cluster__nodes": 2, "train__checkpoint_every_steps": CHECKPOINT_EVERY,
          "train__eval_every_steps": 0, "train__log_every_steps": 1, "parallel__timeout_s": 600}
FOUR_RANKS = {**RECIPE, "parallel__tp": 2, "parallel__dp": 2}
TWO_RANKS = {**RECIPE, "parallel__dp": 2, "cluster__processes_per_node": 1}


def steps(number: int) -> dict[str, int]:
    """The recipe with so many steps of distillation."""
    return {"distill__tokens": number * 4 * 32}


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Two nodes, Slurm and munge as on a real cluster."""
    install()
    if reason := why_not():
        pytest.skip(reason)
    with Lab() as running:
        yield running


@pytest.fixture(scope="session")
def locally(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:  # noqa: F811
    """`locally(**changes)`: the run's folder after `launchers/local`: what every other way must come to."""
    known: dict[str, Path] = {}

    def run(**changes: object) -> Path:
        if repr(changes) not in known:
            folder = tmp_path_factory.mktemp("locally")
            launch_locally(inputs.arguments(folder / "outputs", **changes), folder)
            known[repr(changes)] = folder / "outputs" / "tiny"
        return known[repr(changes)]

    return run


def launch_locally(arguments: list[str], folder: Path) -> None:
    """`launchers/local` with these arguments, in `folder`, to its end."""
    done = subprocess.run([ROOT / "launchers/local", *arguments], cwd=folder, env=environment(), capture_output=True,
                          text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def environment() -> dict[str, str]:
    """Of the launchers: this Python, no GPU."""
    return {"MINITRON_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | dict(os.environ)


class Submitted:
    """A recipe that `launchers/slurm` was given in `folder`; its results are in `folder`/outputs/`name`."""

    def __init__(self, lab: Lab, folder: Path, name: str, arguments: list[str]) -> None:
        self.lab, self.folder, self.run_dir = lab, folder, folder / "outputs" / name
        self.arguments = arguments
        self.jobs: list[str] = []

    def submit(self) -> list[str]:
        """Submit once more; returns the numbers of the jobs."""
        shown = self.lab.run([str(ROOT / "launchers/slurm"), *self.arguments], cwd=self.folder, **environment())
        jobs = re.findall(r"^job (\d+):", shown, re.MULTILINE)
        assert jobs, shown
        self.jobs += jobs
        return jobs

    def state(self, job: str | None = None) -> str:
        """JobState of a job, the last one submitted unless told otherwise."""
        return self.lab.job(job or self.jobs[-1])["JobState"]

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> float:
        """Wait for something; returns how long it took in seconds."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < seconds, f"waited {seconds:.0f} s for {what}\n{self.log()[-6000:]}"
            time.sleep(0.05)
        return time.monotonic() - started

    def wait_ended(self, seconds: float = 400.0, job: str | None = None) -> str:
        """Wait until a job has ended for good; returns its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.state(job) in over, seconds, "the job to end")
        return self.state(job)

    def log(self, job: str | None = None) -> str:
        """What a job printed."""
        numbers = [job] if job else self.jobs
        paths = [path for number in numbers for path in sorted((self.run_dir / "slurm").glob(f"{number}*.log"))]
        return "".join(path.read_text() for path in paths)

    def step(self) -> int:
        """The last step of `distill` that is written down."""
        path = self.run_dir / "round1/distill/metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


@pytest.fixture
def submitted(lab: Lab, tmp_path: Path) -> Iterator[Callable[[str, list[str]], Submitted]]:
    """`submitted(name, arguments)`: the recipe of that name, to be submitted; its jobs end with the test."""
    submitted: list[Submitted] = []

    def make(name: str, arguments: list[str]) -> Submitted:
        submitted.append(Submitted(lab, tmp_path, name, arguments))
        return submitted[-1]

    yield make
    for job in [job for run in submitted for job in run.jobs]:
        lab.run(["scancel", job], check=False)
    for run in submitted:
        for job in run.jobs:
            run.wait_ended(60, job)


@pytest.fixture
def recipe(submitted: Callable[[str, list[str]], Submitted], inputs: Inputs,  # noqa: F811
           tmp_path: Path) -> Callable[..., Submitted]:
    """`recipe(key__part=value)`: the tiny recipe, to be submitted."""
    return lambda **changes: submitted("tiny", inputs.arguments(tmp_path / "outputs", **changes))


def losses(run_dir: Path) -> list[float]:
    """Training loss of every step in order, nats/token."""
    lines = [json.loads(line) for line in (run_dir / "round1/distill/metrics.jsonl").read_text().splitlines()]
    found = [line["step"] for line in lines if "loss" in line]
    assert found == list(range(1, len(found) + 1)), "every step once"
    return [line["loss"] for line in lines if "loss" in line]


def held_out(run_dir: Path) -> list[float]:
    """Held-out losses of teacher, pruned and distilled model, nats/token."""
    (found,) = json.loads((run_dir / "summary.json").read_text())["rounds"]
    return [found[name]["loss"] for name in ("teacher", "pruned", "distilled")]


def check_equal(run_dir: Path, reference: Path) -> None:
    """The same losses within 1e-5 nats/token, at every step and in the end."""
    assert losses(run_dir) == pytest.approx(losses(reference), abs=1e-5)
    assert held_out(run_dir) == pytest.approx(held_out(reference), abs=1e-5)
