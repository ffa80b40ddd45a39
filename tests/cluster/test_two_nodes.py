"""The recipe over two nodes gives what the local launcher gives."""

import json

from tests.cluster.conftest import FOUR_RANKS, check_equal, steps


def test_two_nodes_of_two_ranks_equal_the_local_launcher(recipe, locally):
    four = FOUR_RANKS | steps(40)
    run = recipe(**four)
    run.submit()
    assert run.wait_ended() == "COMPLETED", run.log()
    check_equal(run.run_dir, locally(**four))
    manifest = json.loads((run.run_dir / "round1/distill/manifest.json").read_text())
    assert (manifest["world"]["world_size"], manifest["world"]["tp"]) == (4, 2)
    assert json.loads((run.run_dir / "job/job.json").read_text())["slurm_job"] == run.jobs[0]
