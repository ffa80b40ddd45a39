"""The recipe over two nodes gives what the local launcher gives."""

import json

from tests.cluster.conftest import check_equal


def test_two_nodes_of_two_ranks_equal_the_local_launcher(recipe, locally):
    run = recipe()
    run.submit()
    assert run.wait_ended() == "COMPLETED", run.log()
    check_equal(run.run_dir, locally)
    manifest = json.loads((run.run_dir / "round1/distill/manifest.json").read_text())
    assert (manifest["world"]["world_size"], manifest["world"]["tp"], manifest["world"]["dp"]) == (4, 2, 2)
