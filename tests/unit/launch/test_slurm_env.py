import pytest

from nemo_minitron.errors import LayoutError
from nemo_minitron.launch.slurm_env import expand_hostlist, in_allocation, tasks_per_node, torch_variables

TASK = {"SLURM_JOB_ID": "41007", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NODEID": "1", "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


def test_a_task_of_a_step():
    assert torch_variables(TASK) == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                                     "MASTER_ADDR": "n1", "MASTER_PORT": "13007"}


@pytest.mark.parametrize("job", range(0, 200_000, 997))
def test_ports_that_linux_does_not_give_out(job):
    assert 1024 < int(torch_variables(TASK | {"SLURM_JOB_ID": str(job)})["MASTER_PORT"]) < 32768


def test_a_rendezvous_that_is_set_is_kept():
    found = torch_variables(TASK | {"MASTER_ADDR": "n2-ib", "MASTER_PORT": "29500"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("n2-ib", "29500")


@pytest.mark.parametrize("environ", [{}, {"RANK": "0", **TASK}, {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}])
def test_what_srun_did_not_start_is_left_alone(environ):
    assert torch_variables(environ) == {}


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE"])
def test_a_task_that_does_not_know_its_place(missing):
    with pytest.raises(LayoutError, match=f"{missing}.*cluster.launcher"):
        torch_variables({name: value for name, value in TASK.items() if name != missing})


@pytest.mark.parametrize(("environ", "expected"), [
    ({}, False), ({"SLURM_JOB_ID": "1"}, True), ({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}, False),
    ({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "4294967290"}, True),
])
def test_inside_an_allocation_but_not_in_a_step(environ, expected):
    assert in_allocation(environ) is expected


@pytest.mark.parametrize(("text", "names"), [
    ("n1", ["n1"]), ("n[1-3]", ["n1", "n2", "n3"]), ("dgx[008-010,12]", ["dgx008", "dgx009", "dgx010", "dgx12"]),
    ("a[1-2]b,c", ["a1b", "a2b", "c"]), ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
])
def test_host_lists(text, names):
    assert expand_hostlist(text) == names


def test_tasks_of_nodes():
    assert tasks_per_node("8(x3),2") == [8, 8, 8, 2]
    with pytest.raises(ValueError, match="not a list"):
        tasks_per_node("eight")
