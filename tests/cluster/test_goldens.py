"""The golden files of `--dry-run` are what a Slurm that claims 32 nodes of 8 GPUs accepts (`sbatch --test-only`)."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import environment
from tests.cluster.lab.lab import Lab, install, why_not
from tests.e2e.command import ROOT

GOLDEN = ROOT / "tests/unit/golden"
SUPERPOD = ["teacher.path=/models/teacher", "data.path=/data/web", "prune.target.ffn_hidden_size=9216",
            "train.global_batch_size=1152", "train.micro_batch_size=1", "parallel=dgx_h100", "parallel.dp=32",
            "cluster=dgx_h100_superpod", "cluster.account=llm", "cluster.nodes=32"]


@pytest.fixture(scope="module")
def superpod() -> Iterator[Lab]:
    """32 nodes that claim 112 CPUs and 8 GPUs each; nothing can run on them."""
    install()
    if reason := why_not():
        pytest.skip(reason)
    with Lab(num_nodes=32, cpus=112, gpus=8, daemons=False) as running:
        yield running


def only_asking(script: str, folder: Path) -> str:
    """A printed script, with every sbatch asked whether it would be accepted instead of given the job."""
    script = script.replace("/ROOT/", f"{ROOT}/").replace("/CWD", str(folder)).replace("/PYTHON", sys.executable)
    script = re.sub(r"mkdir -p .*\n", "", script).replace("sbatch --parsable", "sbatch --test-only")
    script = re.sub(r'"--dependency=afterok:\$job\d+"', "", script)  # there is no job to wait for
    return re.sub(r"afterok:\$job\d+,", "", script)


@pytest.mark.parametrize(("name", "sizes"), [("one_job_32x8", [32]), ("container_32x8", [32]),
                                             ("chain_32x8", [4, 1, 32]), ("llama31_minitron_4b_width_32x8", [32]),
                                             ("llama31_minitron_4b_depth_32x8", [32]),
                                             ("mistral_nemo_minitron_8b_32x8", [32]),
                                             ("nemotron4_minitron_16x8", [16])])
def test_sbatch_accepts_the_golden_files(name, sizes, superpod, tmp_path):
    script = only_asking((GOLDEN / f"{name}.sh").read_text(), tmp_path)
    assert processors(superpod.run(["bash", "-c", script]), "batch") == [112 * nodes for nodes in sizes]


@pytest.mark.parametrize(("name", "sizes"), [("demo_search_array", [2, 2, 2, 2]), ("demo_search_chain", [1, 2, 2, 1])])
def test_sbatch_accepts_job_arrays(name, sizes, superpod, tmp_path):
    """The stages before the search, an array a rung, the stages after it; nodes are shared with others."""
    script = only_asking((GOLDEN / f"{name}.sh").read_text(), tmp_path)
    assert "--array=0-8" in script
    assert processors(superpod.run(["bash", "-c", script]), "main") == sizes


def processors(said: str, partition: str) -> list[int]:
    """Of each job that sbatch says it would start in a partition."""
    told = rf"using (\d+) processors on nodes \S+ in partition {partition}\b"
    found = [int(count) for count in re.findall(told, said)]
    assert found, said
    return found


@pytest.mark.parametrize("change", [("--nodes=32", "--nodes=33"), ("--gpus-per-node=8", "--gpus-per-node=9"),
                                    ("--partition=batch", "--partition=bacth")])
def test_it_refuses_what_does_not_fit(change, superpod, tmp_path):
    script = only_asking((GOLDEN / "one_job_32x8.sh").read_text(), tmp_path)
    assert change[0] in script
    with pytest.raises(AssertionError, match="exit code 1"):
        superpod.run(["bash", "-c", script.replace(*change)])


def test_a_partition_that_the_cluster_does_not_know_is_told_with_what_sinfo_offers(superpod, tmp_path):
    said = superpod.run([str(ROOT / "launchers/slurm"), *SUPERPOD, f"output_dir={tmp_path}",
                         "cluster.partition=bacth"], check=False, cwd=tmp_path, **environment())
    assert said.strip() == ("launchers/slurm: unknown partition; expected one that sinfo offers: batch, main, spot; "
                            "found bacth (change cluster.partition)")
    assert list(tmp_path.iterdir()) == []
