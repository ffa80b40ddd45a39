"""Logs of the ranks, and what is told when one of two ranks sleeps or is killed in the middle of training."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.e2e.command import run, start
from tests.e2e.test_kill import descendants, start_and_wait, wait_until

# sitecustomize of the ranks: rank NUMBER runs PLANTED once a module is there that imports what it changes
PLANT = """
import os
import sys
import threading
import time


def plant():
    while not hasattr(sys.modules.get("MODULE"), "ATTRIBUTE"):
        time.sleep(0.05)
    PLANTED

if os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "NUMBER":
    threading.Thread(target=plant, daemon=True).start()
"""

SLEEP = """
    from nemo_minitron.training.module import TrainingModule

    data_step = TrainingModule.data_step

    def oversleep(self, data):
        if self.trainer.global_step == 5:
            time.sleep(600)
        return data_step(self, data)

    TrainingModule.data_step = oversleep
"""

SLOW_TO_FAIL = """
    from nemo_minitron.training.points import ResumePoints

    on_exception = ResumePoints.on_exception

    def slow(self, *arguments):
        on_exception(self, *arguments)
        for _ in range(30):
            time.sleep(0.1)

    ResumePoints.on_exception = slow
"""

SLOW_TO_SCORE = """
    score = sys.modules["nemo_minitron.stages.score"]
    collect_scores = score.collect_scores

    def slow(*arguments, **more):
        print("slow", flush=True)
        for _ in range(100):
            time.sleep(0.1)
        return collect_scores(*arguments, **more)

    score.collect_scores = slow
"""


def plant(directory, planted, *, rank, where="nemo_minitron.training.trainer:fit"):
    """A folder whose `sitecustomize` lets this rank do what is planted, once the function `where` is there."""
    modules = directory / "modules"
    modules.mkdir()
    text = PLANT.replace("    PLANTED", planted).replace("NUMBER", str(rank))
    for name, value in zip(("MODULE", "ATTRIBUTE"), where.split(":"), strict=True):
        text = text.replace(name, value)
    (modules / "sitecustomize.py").write_text(text)
    return modules


def lines(path):
    """Of a log, without those that say when it was opened."""
    return [line for line in path.read_text().splitlines() if not line.startswith("--- ")]


def test_what_the_terminal_shows_is_in_rank_0_s_logs(undisturbed):
    run_dir, finished = undisturbed
    logged = [lines(run_dir / f"logs/{stage}/rank_0.log")
              for stage in ("score", "prune", "distill", "evaluate", "report")]
    assert [line for part in logged for line in part] == finished.stdout.splitlines()
    assert all(part[0].startswith("== ") and len(part) > 1 for part in logged)


def test_one_rank_sleeps_in_the_middle_of_a_step(halfway, inputs):
    finished = run(inputs.arguments(halfway / "outputs", parallel__dp=2, parallel__stall_s=20, parallel__timeout_s=900),
                   halfway, modules=plant(halfway, SLEEP, rank=1))
    assert finished.code == 1
    told = finished.stderr.splitlines()
    assert re.fullmatch(r"rank \d failed:", told[0]) and told[1] == "no progress for 20 s (parallel.stall_s)", told
    assert re.fullmatch(r"rank 0: step 6 of distill, in all_reduce at \S+\.py:\d+", told[2]), told
    assert re.fullmatch(r"rank 1: step 6 of distill, in oversleep at \S+/sitecustomize\.py:\d+", told[3]), told
    assert told[4:] == [f"logs of the ranks: {halfway}/outputs/tiny/logs"]
    for rank in range(2):
        log = (halfway / f"outputs/tiny/logs/distill/rank_{rank}.log").read_text()
        assert told[2 + rank] in log and "most recent call first" in log
        assert re.search(r'File ".*/nemo_minitron/training/trainer\.py", line \d+ in fit$', log, re.MULTILINE)
    assert "[distill]" not in (halfway / "outputs/tiny/logs/distill/rank_1.log").read_text(), "rank 0 alone says that"


def of_rank(number, tree):
    """The process of this rank among those of `tree`."""
    variable = f"\0RANK={number}\0".encode()
    (found,) = [pid for pid in tree if variable in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
    return found


@pytest.mark.parametrize("slow", [False, True], ids=["at_once", "signal_comes_first"])
def test_one_rank_is_killed_and_the_other_ends_at_once(halfway, inputs, slow):
    """torchrun then tells the other to end: that is no stop, after which a job on a cluster would be put back."""
    process, tree = start_and_wait(inputs, halfway, 3, plant(halfway, SLOW_TO_FAIL, rank=0) if slow else None,
                                   parallel__dp=2, parallel__timeout_s=900)
    os.kill(of_rank(1, tree), signal.SIGKILL)
    _, stderr = process.communicate(timeout=25)  # torchrun itself would wait 30 s for the other
    assert process.returncode == 1
    assert "stopped by" not in stderr
    assert "rank 1: ended without a word (killed, or out of memory?)" in stderr.splitlines()
    assert re.search(r"^rank 0: step \d+ of distill, in \w+ at ", stderr, re.MULTILINE), stderr


def test_one_rank_is_killed_outside_of_a_training(inputs, tmp_path):
    """There a signal ends a rank at once."""
    modules = plant(tmp_path, SLOW_TO_SCORE, rank=0, where="nemo_minitron.stages.score:collect_scores")
    process = start(inputs.arguments(tmp_path / "outputs", parallel__dp=2, parallel__timeout_s=900), tmp_path,
                    modules=modules)
    try:
        log = tmp_path / "outputs/tiny/logs/score/rank_0.log"
        assert wait_until(lambda: log.exists() and "slow" in log.read_text(), 120)
        os.kill(of_rank(1, descendants(process.pid)), signal.SIGKILL)
        _, stderr = process.communicate(timeout=25)
    finally:
        process.kill()
    assert process.returncode == 1
    assert stderr.splitlines()[-3:] == [
        "rank 0: stopped by SIGTERM", "rank 1: ended without a word (killed, or out of memory?)",
        f"logs of the ranks: {tmp_path}/outputs/tiny/logs"]
