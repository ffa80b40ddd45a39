import json
import sys

import pytest

from nemo_minitron.compose import config_from_dict
from nemo_minitron.errors import UserError
from nemo_minitron.launch import side_by_side
from nemo_minitron.launch.side_by_side import run_side_by_side
from nemo_minitron.launch.workers import Stopped, WorkerError

RANK = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
assert job["token"] == os.environ["MINITRON_JOB"]

def stop(*_):
    record = {"rank": 0, "message": "stopped by SIGTERM", "time": 1.0, "token": job["token"]}
    (folder / "stopped_0.json").write_text(json.dumps(record))
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
(folder / "ready").touch()
deadline = time.monotonic() + 30
while not all((folder.parent / name / "ready").exists() for name in job["wait_for"]):
    assert time.monotonic() < deadline
    time.sleep(0.01)
print("does", job["does"], flush=True)
if job["does"] == "mistake":
    record = {"kind": "user", "rank": 0, "message": "bad", "time": 1.0, "token": job["token"]}
    (folder / "error_0.json").write_text(json.dumps(record))
    sys.exit(2)
if job["does"] == "crash":
    sys.exit("lost a rank")
if job["does"] == "stop":
    stop()
if job["does"] == "wait":
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """`start("work", "wait")`: run jobs side by side whose ranks are small programs that do this."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    monkeypatch.setattr(side_by_side, "local_command",
                        lambda processes, arguments: [sys.executable, str(script), *arguments])
    config = config_from_dict({"output_dir": str(tmp_path), "parallel": {"tp": 2, "dp": 4, "search_groups": 2}})

    def run(*does):
        everybody = [f"group{number + 1}" for number in range(len(does))]
        with open(tmp_path / "lock", "w") as lock:
            run_side_by_side(config, [{"does": one, "wait_for": everybody} for one in does], command="minitron",
                             lock=lock.fileno(), round_name="round1")
        return [json.loads((tmp_path / "run/job" / name / "job.json").read_text()) for name in everybody]

    return run


def test_jobs_run_at_the_same_time_each_with_its_share_of_the_replicas(start, capfd):
    jobs = start("work", "work")  # each waits until the other has started
    assert [job["processes"] for job in jobs] == [4, 4]
    assert all((job["config"]["parallel"]["tp"], job["config"]["parallel"]["dp"]) == (2, 2) for job in jobs)
    assert jobs[0]["token"] != jobs[1]["token"] and jobs[0]["alive"] == jobs[1]["alive"]
    assert sorted(capfd.readouterr().out.splitlines()) == ["1| does work", "2| does work"]


@pytest.mark.parametrize(("does", "error", "message"), [
    (("mistake", "wait"), UserError, "^bad$"), (("wait", "mistake"), UserError, "^bad$"),
    (("wait", "crash"), WorkerError, "lost a rank"), (("stop", "wait"), Stopped, "stopped by SIGTERM"),
])
def test_one_that_does_not_end_well_stops_the_others(does, error, message, start, tmp_path):
    with pytest.raises(error, match=message):
        start(*does)
    waiting = tmp_path / "run/job" / f"group{does.index('wait') + 1}"
    assert (waiting / "stopped_0.json").exists(), "the other wrote its resume point and ended"
    job_dir = tmp_path / "run/job"
    assert (job_dir / "error_0.json").exists() == ("mistake" in does), "minitron status finds it"
    assert (job_dir / "ended.json").exists() == (error is not UserError)
