"""The pool that every multi-rank test stands on: results, reports of failures, and recovery from them."""

import time

import pytest

from tests.support.ranks import RankFailure

JOBS = "tests.multirank.jobs_pool"


@pytest.fixture
def pool(rank_pool):
    return rank_pool(2)


def test_results_come_in_order_of_ranks_from_connected_ranks(pool):
    results = pool.run(f"{JOBS}:total", start=1.5)
    assert [(r["rank"], r["world_size"], r["total"]) for r in results] == [(0, 2, 4.0), (1, 2, 4.0)]


def test_the_same_processes_serve_the_next_job(pool):
    first = pool.run(f"{JOBS}:total", start=0)
    second = pool.run(f"{JOBS}:total", start=0)
    assert [r["pid"] for r in first] == [r["pid"] for r in second]


def test_an_exception_on_one_rank_reports_all_ranks_and_the_pool_recovers(pool):
    with pytest.raises(RankFailure) as failure:
        pool.run(f"{JOBS}:raise_on", bad=1)
    zero, one = str(failure.value).split("--- rank 1 ---")
    assert "--- rank 0 ---" in zero
    assert "still running" in zero
    assert "in raise_on" in zero  # where rank 0 waits, not only that it does
    assert "ValueError: rank 1 will not" in one
    assert pool.run(f"{JOBS}:total", start=0)[1]["total"] == 1.0


def test_a_timeout_shows_where_the_slow_rank_is_and_the_pool_recovers(pool):
    pool.run(f"{JOBS}:total", start=0)
    started = time.monotonic()
    with pytest.raises(RankFailure) as failure:
        pool.run(f"{JOBS}:sleep_on", slow=0, timeout=1)
    assert time.monotonic() - started < 60  # of the 600 that the job sleeps
    zero, one = str(failure.value).split("--- rank 1 ---")
    assert "not done after 1 s" in zero
    assert "in sleep_on" in zero
    assert one.strip().startswith("done")
    assert pool.run(f"{JOBS}:total", start=0)[1]["total"] == 1.0


def test_a_rank_that_dies_is_named(pool):
    with pytest.raises(RankFailure, match=r"rank 0 ---\nthe process died"):
        pool.run(f"{JOBS}:die_on", bad=0)


def test_a_result_that_is_not_json_is_the_jobs_failure(pool):
    with pytest.raises(RankFailure, match="Tensor is not JSON serializable"):
        pool.run(f"{JOBS}:return_tensor")
