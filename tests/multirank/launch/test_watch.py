"""Ranks of which one does not come to a collective: all say where they stood, and end."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_minitron.artifacts import write_json
from nemo_minitron.launch.watch import Watch, leave_record, ranks_of, wait_for_others
from nemo_minitron.launch.workers import TOKEN, WorkerError, raise_worker_error

ROOT = Path(__file__).resolve().parents[3]
WORLD_SIZE = 3


def run(job_dir, *, stall_s, rank_1):
    """Exit codes of the ranks and the seconds from the first line of their logs to the end of the last."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    write_json(job_dir / "job.json", {"processes": WORLD_SIZE})
    ranks = [subprocess.Popen([sys.executable, "-m", "tests.support.watched_rank", str(job_dir), str(rank),
                               str(WORLD_SIZE), str(stall_s), rank_1], cwd=ROOT, env=environment)
             for rank in range(WORLD_SIZE)]
    try:
        started = time.monotonic()
        while not all((job_dir.parent / f"logs/distill/rank_{rank}.log").exists() for rank in range(WORLD_SIZE)):
            assert time.monotonic() - started < 120
            time.sleep(0.05)
        started = time.monotonic()
        codes = [rank.wait(60) for rank in ranks]
        return codes, time.monotonic() - started
    finally:
        for rank in ranks:
            rank.kill()


def log(job_dir, rank):
    return (job_dir.parent / f"logs/distill/rank_{rank}.log").read_text()


def test_one_rank_sleeps_in_the_middle_of_a_step(tmp_path):
    job_dir = tmp_path / "job"
    codes, seconds = run(job_dir, stall_s=4, rank_1="sleep")
    assert codes == [1] * WORLD_SIZE and seconds < 30, "long before the collective's 300 s"
    with pytest.raises(WorkerError) as raised:
        raise_worker_error(job_dir, [], returncode=1)
    told = str(raised.value).splitlines()
    assert re.fullmatch(r"rank \d failed:", told[0]) and told[1] == "no progress for 4 s (parallel.stall_s)"
    expected = [("all_reduce", r"\d+"), ("stuck", r"\d+"), ("all_reduce", r"\d+")]
    for rank, (doing, line) in enumerate(expected):
        pattern = rf"rank {rank}: step 7 of distill, in {doing} at tests/support/watched_rank\.py:{line}"
        assert re.fullmatch(pattern, told[2 + rank]), told
        assert told[2 + rank] in log(job_dir, rank)
        assert re.search(r'^(Current )?[Tt]hread .*most recent call first.*:\n', log(job_dir, rank), re.MULTILINE)
        assert f"watched_rank.py\", line {told[2 + rank].rpartition(':')[2]} in" in log(job_dir, rank)
    assert told[5:] == [f"logs of the ranks: {tmp_path}/logs"]


def test_when_one_rank_has_failed_the_rest_end_at_once(tmp_path):
    job_dir = tmp_path / "job"
    codes, seconds = run(job_dir, stall_s=300, rank_1="fail")
    assert codes == [1] * WORLD_SIZE and seconds < 15
    with pytest.raises(WorkerError, match=r"^rank 1 failed:\nValueError: planted\nrank 0: step 7 of distill, in all"):
        raise_worker_error(job_dir, [], returncode=1)
    for rank in (0, 2):
        record = json.loads((job_dir / f"where_{rank}.json").read_text())
        assert record["message"] == "rank 1 has failed" and record["where"] in log(job_dir, rank)


def test_a_rank_knows_that_another_has_failed_before_a_signal_tells_it_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_minitron.launch.watch.POLL_S", 0.05)
    monkeypatch.setattr("nemo_minitron.launch.watch.ALONE_S", 0.05)
    watch = Watch(tmp_path, rank=0, world_size=2, stall_s=100)
    codes: list[int] = []
    monkeypatch.setattr("os._exit", lambda code: (codes.append(code), watch.leave()))
    assert watch.failed == []
    leave_record(tmp_path, "error", {"rank": 1})
    watch.start()
    watch.join(20)
    assert codes == [1] and watch.failed == [1] and ranks_of(tmp_path, "where") == [0]


def test_what_an_earlier_job_left_is_no_alarm(tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN, "earlier")
    leave_record(tmp_path, "error", {"rank": 1})
    assert ranks_of(tmp_path, "error") == [1]
    monkeypatch.setenv(TOKEN, "now")
    assert ranks_of(tmp_path, "error") == []
    leave_record(tmp_path, "error", {"rank": 4})
    assert ranks_of(tmp_path, "error") == [4]


def test_ranks_wait_for_each_other_s_words_but_not_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_minitron.launch.watch.GRACE_S", 0.3)
    for name in ("error_10.json", "error_2.json", "where_0.json", "job.json", ".error_3.json.77", "stopped.json"):
        (tmp_path / name).write_text("{}")
    assert ranks_of(tmp_path, "error") == [2, 10] and ranks_of(tmp_path, "where") == [0]
    assert ranks_of(tmp_path / "none", "error") == []
    for world_size, waits in ((3, False), (4, True)):
        started = time.monotonic()
        wait_for_others(tmp_path, world_size)
        assert (time.monotonic() - started >= 0.3) == waits
