"""What ends a job on a cluster, and that the run then comes to the undisturbed run's losses.

With MINITRON_FAULTS=FILE each test adds a line to FILE: what was done, seconds until training went on, steps lost;
`docs/faults.md` has the table.
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import CHECKPOINT_EVERY, TWO_RANKS, check_equal, steps

NUM_STEPS, AT_STEP = 150, 50
RUN = TWO_RANKS | steps(NUM_STEPS)


@pytest.fixture
def run(recipe, locally):
    """`run(**changes)`: the recipe on two nodes, scored and pruned already, submitted and past AT_STEP."""
    def start(**changes):
        submitted = recipe(**RUN | changes)
        shutil.copytree(locally(**RUN).parent, submitted.run_dir.parent)
        for stage in ("distill", "evaluate", "report"):
            shutil.rmtree(submitted.run_dir / "round1" / stage)
        submitted.submit()
        submitted.wait(lambda: submitted.step() > AT_STEP, 300, f"step {AT_STEP}")
        return submitted

    return start


def processes(folder: Path, *words: str) -> list[int]:
    """Processes whose command line names `folder` and one of `words`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if any(str(folder) in part for part in line) and set(words) & set(line):
                found.append(int(entry.name))
    return found


def stopped_after(run, name, *, times):
    """Wait until signal `name` has stopped the run so many times and it is back in the queue; returns the last step."""
    def steps_done():
        return re.findall(rf"stopped by {name} after step (\d+)", run.log())

    run.wait(lambda: len(steps_done()) == run.log().count("goes back into the queue") == times, 90, "the requeue")
    return int(steps_done()[-1])


def went_on(run, done_before, since):
    """Wait until the run does steps again; returns (seconds since the fault, steps that were lost)."""
    def news():
        parts = run.log().split("going on from step ")
        return re.search(r"^\[distill\] step (\d+)/", parts[-1], re.MULTILINE) if len(parts) > 1 else None

    run.wait(lambda: news() is not None, 300, "the next step")
    resumed = int(run.log().split("going on from step ")[-1].split()[0])
    return time.time() - since, done_before - resumed


def finish(run, locally, what, measured, again):
    """Wait for the end, compare, and write the line of the table."""
    assert run.wait_ended() == "COMPLETED", run.log()
    check_equal(run.run_dir, locally(**RUN))
    seconds, lost = measured
    line = {"what": what, "again": again, "seconds": round(seconds, 1), "lost": lost}
    if "MINITRON_FAULTS" in os.environ:
        with open(os.environ["MINITRON_FAULTS"], "a") as file:
            file.write(json.dumps(line) + "\n")
    return line


@pytest.mark.slow
def test_preemption_with_grace_time(run, locally, lab):
    started = run(cluster__partition="spot")
    job = started.jobs[0]
    since = time.time()
    lab.run(["sbatch", "--partition=main", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"])
    done = stopped_after(started, "SIGTERM", times=1)
    line = finish(started, locally, "preempted, 15 s of grace", went_on(started, done, since), "by itself")
    assert line["lost"] == 0, "a resume point was written after the last step"
    assert lab.job(job)["Restarts"] == "1" and started.jobs == [job]


@pytest.mark.slow
def test_usr1_twice_as_before_the_time_limit(run, locally, lab):
    started = run()
    for time_limit in range(1, 3):
        since = time.time()
        lab.run(["scancel", "--signal=USR1", started.jobs[0]])
        done = stopped_after(started, "SIGUSR1", times=time_limit)
        started.wait(lambda n=time_limit: started.log().count("going on from step") == n, 300, "training to go on")
        measured = went_on(started, done, since)
        started.wait(lambda d=done: started.step() > d + 5, 100, "more steps")
    line = finish(started, locally, "SIGUSR1, as before the time limit (twice)", measured, "by itself")
    assert line["lost"] == 0 and lab.job(started.jobs[0])["Restarts"] == "2"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_time_limit_reached_twice(recipe, locally, lab):
    long = TWO_RANKS | steps(2000)
    started = recipe(**long, cluster__time_limit=2, cluster__grace_s=60)
    started.submit()
    assert started.wait_ended(1500) == "COMPLETED", started.log()
    assert int(lab.job(started.jobs[0])["Restarts"]) >= 2, "training is to be longer than two limits"
    assert started.log().count("stopped by SIGUSR1") >= 2
    check_equal(started.run_dir, locally(**long))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["job", "step"])
def test_scancel(how, run, locally, lab):
    """A job's ranks get SIGTERM first and write a resume point; Slurm kills those of a step at once."""
    started = run()
    since = time.time()
    lab.run(["scancel", started.jobs[0] + (".0" if how == "step" else "")])
    assert started.wait_ended() == ("CANCELLED" if how == "job" else "FAILED")
    done = started.step()
    started.submit()
    line = finish(started, locally, f"scancel of the {how}", went_on(started, done, since), "submitted again")
    assert 0 <= line["lost"] <= (0 if how == "job" else CHECKPOINT_EVERY + 5)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["one rank", "the launcher", "the whole tree"])
def test_kill_9(who, run, locally):
    started = run()
    words = {"one rank": ["nemo_minitron.worker"], "the launcher": ["nemo_minitron.cli"],
             "the whole tree": ["nemo_minitron.worker", "nemo_minitron.cli", "srun"]}[who]
    victims = [pid for pid in processes(started.folder, *words)
               if who != "one rank" or "srun" not in Path(f"/proc/{pid}/cmdline").read_text()]
    assert victims
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in victims}
    since, done = time.time(), started.step()
    for pid in victims[:1] if who == "one rank" else victims:
        os.kill(pid, signal.SIGKILL)
    assert started.wait_ended(60) == "FAILED", f"at once, not after a collective's time limit; {lines}\n{started.log()}"
    done = max(done, started.step())
    if who == "one rank":
        assert re.search(r"^rank \d+ failed:|ended without saying why", started.log(), re.MULTILINE)
    started.submit()
    line = finish(started, locally, f"kill -9 of {who}", went_on(started, done, since), "submitted again")
    assert 0 <= line["lost"] <= CHECKPOINT_EVERY + 5


@pytest.mark.slow
def test_a_truncated_newest_resume_point(run, locally, lab):
    started = run()
    lab.run(["scancel", "--signal=KILL", started.jobs[0]])
    started.wait_ended(60)
    done, since = started.step(), time.time()
    points = sorted(path.parent for path in started.run_dir.glob("round1/distill/resume/step_*/complete.json"))
    assert len(points) == 2
    victim = max(points[-1].glob("__*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    started.submit()
    line = finish(started, locally, "newest resume point truncated", went_on(started, done, since), "submitted again")
    assert f"resume point of step {int(points[-1].name[5:])} is damaged: {victim.name}" in started.log()
    assert line["lost"] == done - int(points[0].name[5:])


@pytest.mark.slow
def test_two_submissions_at_once(run, locally, lab):
    started = run()
    first = started.jobs[0]
    (second,) = started.submit()
    assert (started.state(first), started.state(second)) == ("RUNNING", "PENDING")
    assert started.wait_ended(job=second) == "COMPLETED" and started.state(first) == "COMPLETED"
    assert "already done: score, prune, distill, evaluate, report" in started.log(second)
    check_equal(started.run_dir, locally(**RUN))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_link_of_one_node_cut_for_a_minute(run, locally, lab):
    """Slurm starts the job again where something of it is left, a step of the same number, and may end both.

    The job then goes back into the queue once more.
    """
    started = run()
    since, done = time.time(), started.step()
    lab.link("n2", "down")
    try:
        started.wait(lambda: started.state() != "RUNNING", 90, "the job to be taken off the lost node")
        done = max(done, started.step())
        time.sleep(max(0.0, 60 - (time.time() - since)))
    finally:
        lab.link("n2", "up")
        lab.stop("n2")
        lab.start_node("n2")
    line = finish(started, locally, "link of one node cut for a minute", went_on(started, done, since), "by itself")
    assert 0 <= line["lost"] <= CHECKPOINT_EVERY + 5
