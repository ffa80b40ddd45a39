import fcntl
import json
import os
import subprocess
import sys

import pytest

from nemo_minitron.artifacts import Manifest, write_json
from nemo_minitron.cli import main
from nemo_minitron.report.status import run_status, shown


@pytest.fixture
def run_dir(tmp_path):
    """A run whose distillation is at step 40 of 100, half a second a step, with a resume point at 30."""
    run = tmp_path / "outputs" / "demo"
    distill = run / "round1" / "distill"
    distill.mkdir(parents=True)
    (run / "config.yaml").write_text("stages: [score, prune, distill, report]\ncontrols: [ce]\n")
    Manifest(stage="score", fingerprint="f", inputs={}, config={}, versions={}, world={}, times={"seconds": 12.5},
             result={}).write(run / "round1" / "score")
    write_json(distill / "started.json", {})
    write_json(distill / "progress.json", {"steps": 100})
    write_json(distill / "resume/step_00000030/complete.json", {})
    lines = [json.dumps({"step": step, "loss": 5.0 - step / 100, "seconds": step / 2}) for step in range(1, 41)]
    (distill / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 40, "heldout_ce": 3.0}', '{"step": 41, "lo']))
    write_json(run / "job/job.json", {"stages": ["distill", "report"], "slurm_job": "17"})
    write_json(run / "jobs.json", [{"job": "17", "stages": ["distill"], "submitted": "2026-01-01T00:00:00Z",
                                    "log": "outputs/demo/slurm/17.log"}])
    (run / ".lock").touch()
    return run


def stages(run):
    return {stage["name"]: stage for stage in run_status(run, now=0.0)["stages"]}


def test_a_run_at_work(run_dir):
    with open(run_dir / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = run_status(run_dir, now=0.0)
    assert (found["state"], found["slurm_job"]) == ("running", "17")
    states = {stage["name"]: stage["state"] for stage in found["stages"]}
    assert states == {"score": "done", "prune": "waiting", "distill": "running", "report": "waiting", "ce": "waiting"}
    distill = found["stages"][2]
    assert (distill["step"], distill["steps"], distill["resume_step"]) == (40, 100, 30)
    assert distill["eta_s"] == pytest.approx(30.0) and distill["loss"] == pytest.approx(4.6)
    text = shown(found)
    assert "running (Slurm job 17)" in text and "step 40/100" in text and "ETA 0:00:30" in text
    assert "job 17: distill" in text and "outputs/demo/slurm/17.log" in text


def test_a_run_that_ended_early_says_why(run_dir):
    write_json(run_dir / "job/error_1.json", {"kind": "failure", "rank": 1, "traceback": "Trace\nboom", "time": 1.0})
    write_json(run_dir / "job/error_0.json", {"kind": "failure", "rank": 0, "traceback": "peer gone", "time": 2.0})
    found = run_status(run_dir, now=0.0)
    assert (found["state"], found["error"], found["slurm_job"]) == ("stopped", "rank 1: boom", None)
    write_json(run_dir / "job/ended.json", {"message": "stopped by SIGUSR1 after step 40"})
    assert run_status(run_dir, now=0.0)["error"] == "stopped by SIGUSR1 after step 40"
    assert stages(run_dir)["distill"]["state"] == "stopped"


def test_a_run_whose_launcher_had_no_time_to_say_why_it_ended(run_dir):
    write_json(run_dir / "job/stopped_2.json", {"rank": 2, "message": "stopped by SIGTERM", "time": 1.0})
    assert run_status(run_dir, now=0.0)["error"] == "stopped by SIGTERM"
    write_json(run_dir / "job/ended.json", {"message": "rank 1: ended without a word"})
    assert run_status(run_dir, now=0.0)["error"] == "rank 1: ended without a word"


def test_a_run_that_is_done(run_dir):
    for name in ("prune", "distill", "report", "ce"):
        Manifest(stage=name, fingerprint="f", inputs={}, config={}, versions={}, world={}, times={"seconds": 1.0},
                 result={"steps": 100} if name == "distill" else {}).write(run_dir / "round1" / name)
    found = run_status(run_dir, now=0.0)
    assert found["state"] == "done" and stages(run_dir)["distill"]["steps"] == 100


def test_from_the_command_without_torch(run_dir):
    script = ("import sys; from nemo_minitron.cli import main; code = main(sys.argv[1:]); "
              "assert code == 0 and not {'torch', 'transformers', 'megatron', 'nemo'} & set(sys.modules), sys.modules")
    done = subprocess.run([sys.executable, "-c", script, "status", str(run_dir), "--json"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["state"] == "stopped"


@pytest.mark.parametrize("arguments", [["status"], ["status", "a", "b"], ["status", "nowhere"]])
def test_no_such_run(arguments, capsys):
    assert main(arguments) == 2
    assert "outputs/NAME" in capsys.readouterr().err


def test_an_alignment_at_work_is_where_its_newest_training_is(run_dir):
    (run_dir / "config.yaml").write_text("stages: [score, align]\n")
    align = run_dir / "round1" / "align"
    for number, name in enumerate(("code", "chat")):
        (align / name).mkdir(parents=True)
        write_json(align / name / "progress.json", {"steps": 10 + number})
        os.utime(align / name / "progress.json", (1000 + number, 1000 + number))
        (align / name / "metrics.jsonl").write_text(json.dumps({"step": 4 + number, "loss": 2.5, "seconds": 1}) + "\n")
    write_json(align / "started.json", {})
    found = stages(run_dir)["align"]
    assert (found["state"], found["step"], found["steps"], found["loss"]) == ("stopped", 5, 11, 2.5)


def test_candidates_of_a_search_that_other_jobs_are_at(run_dir):
    """Two are done, a task of a job array holds the lock of a third; no run holds that of the whole."""
    (run_dir / "config.yaml").write_text("stages: [score, prune, distill]\nsearch: {tokens: 1024, compare: true}\n")
    search = run_dir / "round1" / "search"
    for number in range(4):
        write_json(search / f"c{number}" / "prune/started.json", {})
        (search / f"c{number}" / ".lock").touch()
        if number < 2:
            write_json(search / f"c{number}" / "distill/manifest.json", {})
    with open(search / "c2/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = run_status(run_dir, now=0.0)
    names = [stage["name"] for stage in found["stages"]]
    assert names == ["score", "search", "prune", "distill", "compare"] and found["state"] == "running"
    status = found["stages"][1]
    assert (status["state"], status["step"], status["steps"], status["at_work"]) == ("running", 2, 4, ("c2",))
    assert "2 candidates done of 4 begun; at work: c2" in shown(found)
    assert stages(run_dir)["search"]["state"] == "stopped"


@pytest.mark.parametrize(("recipe", "expected"), [
    ("stages: [score, prune]\n", ["score", "prune"]),
    ("stages: [score, prune]\nrounds: [{name: a, search: null}, {name: b, search: minitron_4b}]\n",
     ["a/score", "a/prune", "b/score", "b/search", "b/prune"]),
])
def test_a_search_is_a_stage_where_there_is_one(recipe, expected, run_dir):
    (run_dir / "config.yaml").write_text(recipe)
    assert list(stages(run_dir)) == expected
    assert all(f"  {name} " in shown(run_status(run_dir, now=0.0)) for name in expected), "a blank after each name"
