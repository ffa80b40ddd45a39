"""The recipe over two nodes gives what the local launcher gives."""

import json
import re

import pytest

from tests.cluster.conftest import FOUR_RANKS, check_equal, launch_locally, losses, steps
from tests.e2e.command import ROOT
from tests.e2e.test_ranks import SLEEP, plant


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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_on_two_nodes_is_shown_beside_the_local_one(submitted, tmp_path):
    """The demo's model, data, batch and learning rate, shortened: 25 steps, and fewer samples to score."""
    demo = ["experiment=demo", "distill.tokens=102400", "importance.num_samples=64", "parallel.tp=2", "parallel.dp=2",
            "parallel.num_threads=1", "optim.warmup_steps=5", "train.eval_every_steps=0",
            f"output_dir={tmp_path}/outputs"]
    launch_locally([*demo, "name=local"], tmp_path)
    local = tmp_path / "outputs/local"
    run = submitted("nodes", [*demo, "name=nodes", "cluster=small_lab", "cluster.nodes=2", f"report.beside=[{local}]"])
    run.submit()
    assert run.wait_ended(900) == "COMPLETED", run.log()
    check_equal(run.run_dir, local)
    assert len(losses(run.run_dir)) == 25
    (beside,) = json.loads((run.run_dir / "summary.json").read_text())["beside"]
    assert [model for _, model, *_ in beside["models"]] == ["teacher", "pruned", "distilled"]
    ((_, stage, number, largest),) = beside["trainings"]
    assert (stage, number) == ("distill", 25) and largest <= 1e-5
    assert "Beside outputs/local" in (run.run_dir / "report.html").read_text()
    for rank in range(4):
        log = (run.run_dir / f"logs/distill/rank_{rank}.log").read_text()
        assert f"on n{rank // 2 + 1}\n" in log


@pytest.mark.slow
def test_one_rank_of_four_sleeps_in_the_middle_of_a_step(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{plant(tmp_path, SLEEP, rank=1)}")
    run = recipe(**FOUR_RANKS | steps(40), parallel__stall_s=30)
    run.submit()
    assert run.wait_ended() == "FAILED", run.log()
    assert re.search(r"^rank \d failed:\nno progress for 30 s", run.log(), re.MULTILINE), run.log()
    for rank in range(4):
        (told,) = re.findall(rf"^rank {rank}: step 6 of distill, in .*", run.log(), re.MULTILINE)
        assert ("oversleep" in told) == (rank == 1), told
        assert told in (run.run_dir / f"logs/distill/rank_{rank}.log").read_text()
