import sys
from pathlib import Path

import pytest

from nemo_minitron.config import ClusterConfig
from nemo_minitron.errors import ConfigError, LayoutError
from nemo_minitron.launch.processes import Placement, is_srun, local_command, placement, srun_command

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
