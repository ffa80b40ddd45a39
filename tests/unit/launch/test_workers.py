import json
import os

import pytest

from nemo_minitron.config import ClusterConfig, Config, ParallelConfig
from nemo_minitron.errors import ConfigError, UserError
from nemo_minitron.launch.workers import (
    RECORD,
    TOKEN,
    KilledAtStart,
    Stopped,
    WorkerError,
    check_token,
    has_stopped,
    raise_worker_error,
    worker_environment,
)


def test_threads_are_fixed_and_shared(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setenv("SOMETHING", "kept")
    found = [worker_environment(Config(), processes) for processes in (1, 4, 8, 24)]
    assert [environment["OMP_NUM_THREADS"] for environment in found] == ["12", "3", "1", "1"]
    assert all(environment["MKL_NUM_THREADS"] == environment["OMP_NUM_THREADS"] for environment in found)
    assert found[0]["SOMETHING"] == "kept"
    asked = worker_environment(Config(parallel=ParallelConfig(num_threads=5)), 4)
    assert asked["OMP_NUM_THREADS"] == "5"


def write_errors(directory, *records):
    for rank, record in enumerate(records):
        (directory / f"error_{rank}.json").write_text(json.dumps({"rank": rank, **record}))


def test_a_mistake_found_on_one_rank_comes_before_what_it_caused_on_others(tmp_path):
    write_errors(tmp_path, {"kind": "failure", "traceback": "peer gone", "time": 1.0},
                 {"kind": "user", "message": "too little text", "time": 2.0})
    with pytest.raises(UserError, match=r"^too little text$"):
        raise_worker_error(tmp_path, [], returncode=1)


def test_the_first_failure_is_shown(tmp_path):
    write_errors(tmp_path, {"kind": "failure", "traceback": "peer gone", "time": 2.0},
                 {"kind": "failure", "traceback": "the cause", "time": 1.0})
    with pytest.raises(WorkerError, match="rank 1 failed:\nthe cause"):
        raise_worker_error(tmp_path, ["noise"], returncode=1)


def test_a_worker_that_says_nothing(tmp_path):
    with pytest.raises(WorkerError, match="Killed"):
        raise_worker_error(tmp_path, ["Killed\n"], returncode=1)


def test_a_mistake_told_on_stderr_counts_like_one_in_the_folder(tmp_path):
    told = RECORD + json.dumps({"kind": "user", "rank": 3, "message": "not shared"}) + "\n"
    with pytest.raises(UserError, match=r"^not shared$"):
        raise_worker_error(tmp_path, [told, "noise\n"], returncode=1)


def write_signals(directory, what, times):
    for rank, time in times.items():
        record = {"rank": rank, "message": f"{what} by SIGTERM, rank {rank}", "time": time}
        (directory / f"{what}_{rank}.json").write_text(json.dumps(record))


def test_a_stop_comes_before_what_it_caused_on_other_ranks(tmp_path):
    job_dir = write_job(tmp_path, 3)
    write_signals(job_dir, "signalled", {0: 1.0, 1: 1.0, 2: 1.1})
    write_signals(job_dir, "stopped", {1: 2.0, 2: 2.1})
    write_errors(job_dir, {"kind": "failure", "traceback": "peer gone", "time": 3.0})
    message = "stopped by SIGTERM, rank 1"
    with pytest.raises(Stopped, match=f"^minitron: {message}; the same command goes on from here$"):
        raise_worker_error(job_dir, [], returncode=1)
    assert json.loads((job_dir / "ended.json").read_text()) == {"message": message}


def test_a_rank_whose_signal_comes_after_its_peer_has_left_for_one(tmp_path):
    job_dir = write_job(tmp_path, 2)
    write_signals(job_dir, "signalled", {0: 1.0, 1: 1.03})
    write_signals(job_dir, "stopped", {0: 1.01})
    (job_dir / "error_1.json").write_text(json.dumps({"kind": "failure", "rank": 1, "traceback": "gone", "time": 1.02}))
    with pytest.raises(Stopped):
        raise_worker_error(job_dir, [], returncode=1)


def test_a_failure_while_the_last_resume_point_is_written_is_no_stop(tmp_path):
    job_dir = write_job(tmp_path, 2)
    write_signals(job_dir, "signalled", {0: 1.0, 1: 1.0})
    write_errors(job_dir, {"kind": "failure", "traceback": "no point", "time": 2.0},
                 {"kind": "failure", "traceback": "peer gone", "time": 2.1})
    with pytest.raises(WorkerError, match=r"^rank 0 failed:\nno point") as raised:
        raise_worker_error(job_dir, [], returncode=1)
    assert not isinstance(raised.value, Stopped)


def test_ranks_that_were_told_and_killed_before_they_could_stop(tmp_path):
    job_dir = write_job(tmp_path, 2)
    write_signals(job_dir, "signalled", {0: 1.0, 1: 1.0})
    with pytest.raises(Stopped, match="signalled by SIGTERM, rank 0"):
        raise_worker_error(job_dir, [], returncode=137)


def test_what_an_earlier_job_left_does_not_count(tmp_path):
    job_dir = write_job(tmp_path, 1)
    (job_dir / "job.json").write_text(json.dumps({"processes": 1, "token": "now"}))
    write_signals(job_dir, "stopped", {0: 1.0})
    assert not has_stopped(job_dir)
    with pytest.raises(WorkerError, match="ended without a word"):
        raise_worker_error(job_dir, [], returncode=1)


def test_a_stop_that_one_rank_heard_of_and_all_agreed_to(tmp_path):
    job_dir = write_job(tmp_path, 2)
    write_signals(job_dir, "signalled", {1: 1.0})
    write_signals(job_dir, "stopped", {0: 2.0, 1: 2.0})
    for returncode in (0, 1):
        with pytest.raises(Stopped, match="stopped by SIGTERM, rank 0"):
            raise_worker_error(job_dir, [], returncode=returncode)


def test_where_a_rank_died_the_signal_that_ends_the_others_is_no_stop(tmp_path):
    job_dir = write_job(tmp_path, 3)
    write_signals(job_dir, "signalled", {0: 1.1, 2: 1.2})
    write_signals(job_dir, "stopped", {2: 1.3})
    with pytest.raises(WorkerError) as raised:
        raise_worker_error(job_dir, ["task 1: Killed\n"], returncode=137)
    assert not isinstance(raised.value, Stopped)
    assert "rank 1: ended without a word" in json.loads((job_dir / "ended.json").read_text())["message"]
    assert str(raised.value).splitlines()[:5] == [
        "a worker ended without saying why:", "task 1: Killed", "rank 0: signalled by SIGTERM, rank 0",
        "rank 1: ended without a word (killed, or out of memory?)", "rank 2: stopped by SIGTERM, rank 2"]


def test_a_rank_that_failed_before_a_signal_came_was_not_stopped(tmp_path):
    job_dir = write_job(tmp_path, 2)
    write_errors(job_dir, {"kind": "failure", "traceback": "the cause", "time": 1.0})
    write_signals(job_dir, "signalled", {0: 1.1, 1: 1.1})
    write_signals(job_dir, "stopped", {1: 1.2})
    with pytest.raises(WorkerError, match=r"^rank 0 failed:\nthe cause"):
        raise_worker_error(job_dir, [], returncode=1)


def test_a_rank_that_sees_another_folder(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    check_token(None, tmp_path, 0)
    monkeypatch.setenv(TOKEN, "abc")
    check_token({"token": "abc"}, tmp_path, 0)
    for job, found in ((None, "nothing"), ({"token": "other"}, "another one")):
        with pytest.raises(ConfigError, match=f"found {found} on .*rank 5.*output_dir"):
            check_token(job, tmp_path, 5)


def test_the_cluster_s_environment_reaches_the_ranks():
    config = Config(cluster=ClusterConfig(environment={"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "7"}))
    found = worker_environment(config, 1)
    assert (found["NCCL_DEBUG"], found["OMP_NUM_THREADS"]) == ("WARN", "7")


def write_job(directory, processes):
    job_dir = directory / "job"
    job_dir.mkdir()
    (directory / "logs/distill").mkdir(parents=True)
    (job_dir / "job.json").write_text(json.dumps({"processes": processes}))
    return job_dir


def test_after_the_traceback_a_line_for_every_rank(tmp_path):
    job_dir = write_job(tmp_path, 4)
    write_errors(job_dir, {"kind": "failure", "traceback": "peer gone\n", "time": 3.0, "where": "rank 0: here"},
                 {"kind": "failure", "traceback": "the cause\n", "time": 1.0, "where": "rank 1: there"})
    (job_dir / "where_2.json").write_text(json.dumps({"rank": 2, "where": "rank 2: in all_reduce"}))
    (tmp_path / "logs/distill/rank_3.log").write_text(
        "--- a\nFatal Python error: Aborted\n--- b\nFatal Python error: Segmentation fault\n\nThread 0x1\n")
    with pytest.raises(WorkerError) as raised:
        raise_worker_error(job_dir, [], returncode=1)
    assert str(raised.value).splitlines() == [
        "rank 1 failed:", "the cause", "rank 0: here", "rank 1: there", "rank 2: in all_reduce",
        "rank 3: ended without a word (Segmentation fault)",
        f"logs of the ranks: {tmp_path}/logs"]


def test_ranks_that_were_all_killed(tmp_path):
    job_dir = write_job(tmp_path, 1)
    (tmp_path / "logs/distill/rank_0.log").write_text("--- a\nFatal Python error: Aborted\n--- b\n[distill] a line\n")
    with pytest.raises(WorkerError) as raised:
        raise_worker_error(job_dir, ["exitcode: -9\n"], returncode=1)
    assert str(raised.value).splitlines()[:3] == [
        "a worker ended without saying why:", "exitcode: -9",
        "rank 0: ended without a word (killed, or out of memory?)"]


def test_ranks_that_were_killed_before_or_after_they_had_met(tmp_path):
    """Only before that the fault can be the node's, which has just come back."""
    job_dir = write_job(tmp_path, 2)
    write_signals(job_dir, "stopped", {0: 1.0})
    for _ in range(3):
        with pytest.raises(KilledAtStart, match="rank 1: ended without a word"):
            raise_worker_error(job_dir, [], returncode=137)
    with pytest.raises(WorkerError) as fourth_in_a_row:
        raise_worker_error(job_dir, [], returncode=137)
    (job_dir / "killed_at_start.json").unlink()
    write_signals(job_dir, "begun", {0: 0.5})
    with pytest.raises(WorkerError) as later:
        raise_worker_error(job_dir, [], returncode=137)
    assert KilledAtStart not in (type(fourth_in_a_row.value), type(later.value))


def test_a_rank_that_failed_at_its_start_was_not_killed(tmp_path):
    job_dir = write_job(tmp_path, 2)
    write_errors(job_dir, {"kind": "failure", "traceback": "no network", "time": 1.0})
    with pytest.raises(WorkerError, match="no network") as raised:
        raise_worker_error(job_dir, [], returncode=1)
    assert not isinstance(raised.value, KilledAtStart)


def test_a_stall_is_told_like_a_failure(tmp_path):
    write_errors(tmp_path, {"kind": "stall", "message": "no progress for 9 s", "time": 1.0, "where": "rank 0: here"})
    with pytest.raises(WorkerError, match=r"^rank 0 failed:\nno progress for 9 s$"):
        raise_worker_error(tmp_path, [], returncode=1)
