"""The recipe over two nodes gives what the local launcher gives."""

import json
import re

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
    logs = [(run.run_dir / f"logs/distill/rank_{rank}.log").read_text() for rank in range(4)]
    nodes = [re.match(rf"--- \S+ rank {rank}, process \d+ on (\S+)\n", log)[1] for rank, log in enumerate(logs)]
    assert nodes == ["n1", "n1", "n2", "n2"]
    said = logs[0].partition("\n")[2]
    assert "[distill] step 40/40" in said and said in run.log() and not any("[distill]" in log for log in logs[1:])
