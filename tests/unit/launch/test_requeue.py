import pytest

from nemo_minitron.config import ClusterConfig
from nemo_minitron.launch.requeue import requeue

BATCH = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "demo"}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in that answers with `state` and writes down how it was called; returns (set state, calls)."""
    log = tmp_path / "calls"

    def become(state, batch=1):
        script = tmp_path / "scontrol"
        script.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$2" = show ] && echo "JobId=7 JobName=a b=c '
                          f'JobState={state} BatchFlag={batch} Comment=x"\nexit 0\n')
        script.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return become, lambda: log.read_text().splitlines() if log.exists() else []


def test_a_running_batch_job_goes_back(scontrol, capsys):
    become, calls = scontrol
    become("RUNNING")
    requeue(ClusterConfig(), BATCH | {"SLURM_RESTART_COUNT": "2"})
    assert calls() == ["--oneliner show job 7", "requeue 7"] and "restart 3" in capsys.readouterr().out


@pytest.mark.parametrize(("state", "batch"), [("CANCELLED", 1), ("PENDING", 1), ("RUNNING", 0)])
def test_a_cancelled_or_interactive_one_does_not(scontrol, state, batch):
    become, calls = scontrol
    become(state, batch)
    requeue(ClusterConfig(), BATCH)
    assert calls() == ["--oneliner show job 7"]


@pytest.mark.parametrize(("cluster", "environ"), [
    ({}, {}), ({"requeue": False}, BATCH), ({"max_restarts": 3}, BATCH | {"SLURM_RESTART_COUNT": "3"}),
    ({}, BATCH | {"SLURM_STEP_ID": "0"}),
])
def test_nobody_is_asked(scontrol, cluster, environ):
    become, calls = scontrol
    become("RUNNING")
    requeue(ClusterConfig(**cluster), environ)
    assert calls() == []


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_one_that_was_killed_at_its_start_goes_back_only_if_it_was_there_before(scontrol, restarts):
    """The first start fails where something is wrong with the job; a later one has worked before."""
    become, calls = scontrol
    become("RUNNING")
    requeue(ClusterConfig(), BATCH | {"SLURM_RESTART_COUNT": restarts}, restarted=True)
    assert calls() == ([] if restarts == "0" else ["--oneliner show job 7", "requeue 7"])


def test_slurm_says_no(tmp_path, monkeypatch, capsys):
    script = tmp_path / "scontrol"
    script.write_text("#!/bin/sh\necho Access denied >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    requeue(ClusterConfig(), BATCH)
    assert "Access denied" in capsys.readouterr().out
