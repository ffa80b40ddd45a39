"""A search as job arrays and side by side on two nodes has the losses of one that trains one after another."""

import pytest

from tests.cluster.conftest import RECIPE, launch_locally
from tests.e2e.test_search import SEARCH, candidates

ONE_RANK = {**RECIPE, **SEARCH, "stages": "[score,prune]", "cluster__nodes": 1, "cluster__processes_per_node": 1}


@pytest.fixture(scope="module")
def one_after_another(inputs, tmp_path_factory):
    """What the search comes to in one process."""
    folder = tmp_path_factory.mktemp("search")
    launch_locally(inputs.arguments(folder / "outputs", **ONE_RANK), folder)
    return candidates(folder / "outputs/tiny")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_job_arrays(recipe, one_after_another):
    """A job before, an array of four, an array of the two that go on, and the job that ranks."""
    run = recipe(**ONE_RANK, cluster__search_array=2)
    assert len(run.submit()) == 4
    assert run.wait_ended(900) == "COMPLETED", run.log()
    assert candidates(run.run_dir) == one_after_another
    tasks = {path.stem for path in (run.run_dir / "slurm").glob("*_*.log")}
    assert tasks == {f"{run.jobs[1]}_{task}" for task in range(4)} | {f"{run.jobs[2]}_{task}" for task in range(2)}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_group_on_each_node(recipe, one_after_another):
    run = recipe(**{**ONE_RANK, "cluster__nodes": 2, "parallel__dp": 2, "parallel__search_groups": 2})
    run.submit()
    assert run.wait_ended(900) == "COMPLETED", run.log()
    assert candidates(run.run_dir) == one_after_another
