"""`minitron latency` on this machine, and a recipe that reads what it wrote."""

import json

from nemo_minitron.search.latency import LatencyTable
from tests.e2e.command import run, run_well

RECIPE = ["experiment=demo_search", "parallel.num_threads=1"]


def test_every_shape_is_measured_and_a_plan_reads_them(tmp_path):
    path = tmp_path / "latency.json"
    done = run_well(["latency", f"output={path}", "new_tokens=4", "prompt_tokens=8", "batch_size=2", "turns=3",
                     *RECIPE], tmp_path)
    table = LatencyTable.load(path)
    assert len(table.shapes) == 9 and "9/9" in done.stdout and "the source as a whole" in done.stdout
    assert all(parts.rest_s > 0 and parts.layer_s >= 0 for parts in table.shapes.values()) and table.whole_s > 0
    assert table.conditions | {"turns": 3} == {"device": "CPU", "precision": "fp32", "threads": 1, "batch_size": 2,
                                               "prompt_tokens": 8, "new_tokens": 4, "turns": 3}
    plan = ["plan", "format=json", *RECIPE, f"search.constraints.latency.table={path}"]
    planned = json.loads(run_well([*plan, "search.constraints.latency.max_ms=1.0"], tmp_path).stdout)
    assert 1 <= planned["rounds"][0]["search"]["num_candidates"] <= 9
    assert "latency" in planned["rounds"][0]["search"]["ruled_out"]
    none = run([*plan, "search.constraints.latency.max_ms=1e-9"], tmp_path)
    assert none.code == 2 and "latency rules out" in none.stderr


def test_bad_arguments(tmp_path):
    for arguments, said in ([RECIPE, "output"], [["output=x", "experiment=demo"], "a recipe with a search"],
                            [["output=x", *RECIPE, "new_tokens=0"], "new_tokens"],
                            [["output=x", *RECIPE, "prompt_tokens=600"], "at most 512"]):
        finished = run(["latency", *arguments], tmp_path)
        assert finished.code == 2 and said in finished.stderr and len(finished.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
