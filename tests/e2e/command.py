"""Starts the real command in a process of its own, and the tiny recipe that the end-to-end tests share."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# 40 steps of 4 samples of 32 tokens, resume points after 10, 20 and 30
TOKENS, SEQ_LENGTH, BATCH, CHECKPOINT_EVERY = 5120, 32, 4, 10
NUM_STEPS = TOKENS // (SEQ_LENGTH * BATCH)
RECIPE = {
    "name": "tiny", "data.num_heldout": 4, "data.seq_length": SEQ_LENGTH, "data.calibration_fraction": 0.5,
    "parallel.num_threads": 1, "parallel.timeout_s": 120, "importance.num_samples": 16,
    "prune.target.hidden_size": 24, "prune.target.ffn_hidden_size": 40,
    "train.global_batch_size": BATCH, "train.micro_batch_size": 2, "train.checkpoint_every_steps": CHECKPOINT_EVERY,
    "train.eval_every_steps": 20, "train.eval_samples": 4, "optim.warmup_steps": 4,
    "distill.tokens": TOKENS, "evaluate.micro_batch_size": 4,
}


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A tiny teacher (Hugging Face directory) and a folder of text."""

    teacher: Path
    text: Path

    def arguments(self, output_dir: Path, **changes: object) -> list[str]:
        """The tiny recipe as overrides; `changes` has keys with `__` for a dot, and None takes a key out."""
        recipe = {"teacher.path": self.teacher, "data.path": self.text, "output_dir": output_dir, **RECIPE}
        recipe |= {key.replace("__", "."): value for key, value in changes.items()}
        return [f"{key}={value}" for key, value in recipe.items() if value is not None]


def start(arguments: list[str], directory: Path, *, modules: Path | None = None) -> subprocess.Popen[str]:
    """Start `minitron arguments` in `directory`, as the leader of a session of its own; Python finds `modules` too."""
    python_path = os.pathsep.join(str(folder) for folder in (ROOT, modules) if folder is not None)
    environment = os.environ | {"PYTHONPATH": python_path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", "nemo_minitron.cli", *arguments], cwd=directory, env=environment,
                            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def run(arguments: list[str], directory: Path, *, timeout: float = 300.0, modules: Path | None = None) -> Finished:
    """Run `minitron arguments` in `directory` to its end."""
    started = time.monotonic()
    process = start(arguments, directory, modules=modules)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, 9)
        process.wait()
        raise
    return Finished(process.returncode, stdout, stderr, time.monotonic() - started)


def run_well(arguments: list[str], directory: Path) -> Finished:
    """Run a command that must succeed."""
    finished = run(arguments, directory)
    assert finished.code == 0, f"exit code {finished.code}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
    return finished


def manifests(run_dir: Path) -> dict[str, tuple[int, str]]:
    """Stage -> (time of change, text) of the manifests of a run."""
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_text())
            for path in sorted(run_dir.glob("round1/*/manifest.json"))}


def summary(run_dir: Path) -> dict:
    """`summary.json` of a run."""
    return json.loads((run_dir / "summary.json").read_text())
