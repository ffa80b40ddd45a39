import sys
from pathlib import Path

import pytest

from nemo_minitron.config import ClusterConfig
from nemo_minitron.errors import ConfigError, LayoutError
from nemo_minitron.launch.processes import (
    Placement,
    group_devices,
    group_placement,
    is_srun,
    local_command,
    placement,
    srun_command,
)

DGX = {"gpus_per_node": 8}


@pytest.mark.parametrize(("cluster", "world", "nodes", "per_node"), [
    ({}, 4, 1, 4), ({"nodes": 2}, 4, 2, 2), ({"processes_per_node": 2}, 4, 2, 2), (DGX, 256, 32, 8), (DGX, 4, 1, 4),
    ({**DGX, "nodes": 32}, 256, 32, 8), ({**DGX, "processes_per_node": 4}, 8, 2, 4),
])
def test_where_ranks_go(cluster, world, nodes, per_node):
    assert placement(ClusterConfig(**cluster), world) == Placement(nodes=nodes, per_node=per_node)


@pytest.mark.parametrize(("cluster", "world", "found"), [
    (DGX, 12, "12 ranks .*2 nodes with 8 each.*cluster.gpus_per_node"), ({**DGX, "nodes": 4}, 16, "16 ranks.*4 nodes"),
    ({**DGX, "processes_per_node": 9}, 18, "at most 8 on a node.*cluster.processes_per_node"),
    ({"nodes": 3}, 4, "cluster.nodes"),
])
def test_a_layout_that_does_not_fit_the_nodes(cluster, world, found):
    with pytest.raises(LayoutError, match=found):
        placement(ClusterConfig(**cluster), world)


@pytest.fixture
def path(tmp_path):
    """A PATH with an srun."""
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    return str(tmp_path)


@pytest.mark.parametrize(("launcher", "environ", "expected"), [
    ("auto", {}, False), ("auto", {"SLURM_JOB_ID": "1"}, True), ("local", {"SLURM_JOB_ID": "1"}, False),
    ("srun", {"SLURM_JOB_ID": "1"}, True), ("auto", {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}, False),
])
def test_who_starts_the_ranks(launcher, environ, expected, path):
    assert is_srun(ClusterConfig(launcher=launcher), environ | {"PATH": path}) is expected


def test_srun_without_slurm_or_outside_of_an_allocation(path, tmp_path):
    with pytest.raises(ConfigError, match=r"not installed.*cluster\.launcher"):
        is_srun(ClusterConfig(launcher="srun"), {"SLURM_JOB_ID": "1", "PATH": str(tmp_path / "empty")})
    with pytest.raises(ConfigError, match=r"no SLURM_JOB_ID.*cluster\.launcher"):
        is_srun(ClusterConfig(launcher="srun"), {"PATH": path})


def test_srun_of_two_nodes(tmp_path):
    command = srun_command(ClusterConfig(cpus_per_task=14, srun=["--cpu-bind=cores"]), Placement(nodes=2, per_node=8),
                           ["job"], output_dir=tmp_path)
    for option in ("--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--distribution=block", "--kill-on-bad-exit=1",
                   "--cpus-per-task=14", "--cpu-bind=cores"):
        assert option in command
    assert command[-4:] == [sys.executable, "-m", "nemo_minitron.worker", "job"]
    assert not any("container" in part for part in command)


def test_srun_into_a_container(tmp_path):
    cluster = ClusterConfig(container="/images/m.sqsh", mounts=["/lustre/models:/models:ro"])
    command = srun_command(cluster, Placement(nodes=1, per_node=1), ["job"], output_dir=tmp_path)
    root = Path(__file__).resolve().parents[3]
    assert "--container-image=/images/m.sqsh" in command
    assert f"--container-mounts={root}:{root},{tmp_path}:{tmp_path},/lustre/models:/models:ro" in command
    inside = srun_command(cluster, Placement(nodes=1, per_node=1), ["job"], output_dir=root / "outputs")
    assert f"--container-mounts={root}:{root},/lustre/models:/models:ro" in inside, "the checkout holds it already"
    assert command[-4:] == ["python", "-m", "nemo_minitron.worker", "job"]


def test_torchrun_here():
    assert local_command(4, ["job"])[-5:] == ["--nproc-per-node", "4", "-m", "nemo_minitron.worker", "job"]


@pytest.mark.parametrize(("cluster", "world", "groups", "expected"), [
    (DGX, 32, 2, (2, 8)), (DGX, 32, 4, (1, 8)), ({"processes_per_node": 2}, 4, 2, (1, 2)), (DGX, 32, 1, (4, 8)),
])
def test_groups_under_srun_have_nodes_of_their_own(cluster, world, groups, expected):
    nodes, per_node = expected
    assert group_placement(ClusterConfig(**cluster), world, groups) == Placement(nodes=nodes, per_node=per_node)


@pytest.mark.parametrize(("world", "groups"), [(8, 2), (32, 8), (24, 2)])
def test_groups_that_would_share_a_node_are_refused_under_srun(world, groups):
    with pytest.raises(LayoutError, match=r"whole nodes.*cluster.launcher=local.*parallel.search_groups"):
        group_placement(ClusterConfig(**DGX), world, groups)


def test_srun_on_nodes_from_the_middle_of_the_allocation(tmp_path):
    command = srun_command(ClusterConfig(), Placement(nodes=2, per_node=8), ["job"], output_dir=tmp_path, first_node=2)
    assert "--relative=2" in command and "--nodes=2" in command
    plain = srun_command(ClusterConfig(), Placement(nodes=2, per_node=8), ["job"], output_dir=tmp_path)
    assert not any(part.startswith("--relative") for part in plain)


@pytest.fixture
def devices(tmp_path):
    """`devices(n)`: a stand-in for /dev with so many GPUs."""
    def make(count):
        for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(count))):
            (tmp_path / name).touch()
        return tmp_path

    return make


@pytest.mark.parametrize(("environ", "gpus", "expected"), [
    ({}, 8, ["0,1,2,3", "4,5,6,7"]), ({}, 12, ["0,1,2,3", "4,5,6,7"]), ({}, 0, None),
    ({"CUDA_VISIBLE_DEVICES": ""}, 8, None),
    ({"CUDA_VISIBLE_DEVICES": "7,6,5,4,3,2,1,0"}, 8, ["7,6,5,4", "3,2,1,0"]),
    ({"CUDA_VISIBLE_DEVICES": ",".join(f"GPU-{letter}" for letter in "abcdefgh")}, 8,
     ["GPU-a,GPU-b,GPU-c,GPU-d", "GPU-e,GPU-f,GPU-g,GPU-h"]),
])
def test_groups_on_one_machine_have_gpus_of_their_own(environ, gpus, expected, devices):
    found = group_devices(8, 2, environ, devices(gpus))
    assert found == ([{}, {}] if expected is None else [{"CUDA_VISIBLE_DEVICES": part} for part in expected])


@pytest.mark.parametrize(("environ", "gpus", "found"), [({}, 4, "4"), ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 8, "3")])
def test_groups_do_not_share_a_gpu_nor_go_to_the_cpu(environ, gpus, found, devices):
    with pytest.raises(LayoutError, match=rf"too few GPUs.*8 .*found {found}.*parallel.dp"):
        group_devices(8, 2, environ, devices(gpus))
