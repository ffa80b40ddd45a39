"""`launchers/*`: what `--dry-run` prints is what would run, kept in golden files; mistakes are told in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron import submit
from nemo_minitron.compose import load_config
from nemo_minitron.config import ClusterConfig, Config
from nemo_minitron.errors import ConfigError, LayoutError
from nemo_minitron.launch.docker import docker_command
from nemo_minitron.launch.processes import Placement

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/unit/golden"
TEACHER = ["teacher.path=/lustre/models/Llama-3.1-8B", "data.path=/lustre/data/web", "name=llama-4b",
           "output_dir=/lustre/out", "prune.target.hidden_size=3072", "prune.target.ffn_hidden_size=9216",
           "train.global_batch_size=1152", "train.micro_batch_size=1", "train.precision=bf16-mixed",
           "parallel=dgx_h100", "parallel.dp=32"]
SUPERPOD = ["cluster=dgx_h100_superpod", "cluster.account=llm", "cluster.nodes=32"]
CHAIN = ("cluster.jobs=[{stages:[score],overrides:['parallel.dp=4','cluster.nodes=4','cluster.time_limit=1:00:00']},"
         "{stages:[prune]},{stages:[distill,evaluate,report]}]")
RECIPES = {
    "one_job_32x8": [*TEACHER, *SUPERPOD],
    "chain_32x8": [*TEACHER, *SUPERPOD, CHAIN],
    "container_32x8": [*TEACHER, *SUPERPOD, "cluster.container=/lustre/images/nemo_minitron.sqsh",
                       "cluster.mounts=[/lustre/models:/lustre/models:ro,/lustre/data:/lustre/data:ro]"],
    **{f"{name}_{nodes}x8": [f"experiment={name}", "teacher.path=/lustre/models/teacher", "data.path=/lustre/data/web",
                             "output_dir=/lustre/out", "cluster=dgx_h100_superpod", "cluster.account=llm",
                             f"cluster.nodes={nodes}"]
       for name, nodes in (("llama31_minitron_4b_width", 32), ("llama31_minitron_4b_depth", 32),
                           ("mistral_nemo_minitron_8b", 32), ("nemotron4_minitron", 16))},  # 128 ranks in the paper
    "demo_search_array": ["experiment=demo_search", "cluster=small_lab", "cluster.search_array=4", "search.rungs=2",
                          "parallel.tp=2"],
    "demo_search_chain": ["experiment=demo_search", "cluster=small_lab", "cluster.search_array=0",
                          "cluster.jobs=[{stages:[score]},{stages:[search],overrides:['parallel.dp=2','cluster.nodes=1']},"
                          "{stages:[prune,distill,compare,evaluate,report]}]"],
    "demo_lab": ["experiment=demo", "cluster=small_lab", "parallel.tp=2", "parallel.dp=2", "controls=[ce]"],
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def dry_run(place, arguments, capsys, tmp_path):
    assert submit.main([place, "--dry-run", *arguments]) == 0
    said = capsys.readouterr()
    assert said.err == "" and list(tmp_path.iterdir()) == [], "nothing is made"
    return said.out


@pytest.mark.parametrize("name", RECIPES)
def test_slurm_prints_exactly_what_it_would_submit(name, capsys, tmp_path):
    found = dry_run("slurm", RECIPES[name], capsys, tmp_path)
    if "demo" in name:  # a job's name depends on the folder that it writes
        found = found.replace(submit.sbatch.job_name(load_config(RECIPES[name])), "demo-NUMBER")
    found = found.replace(sys.executable, "/PYTHON").replace(str(ROOT), "/ROOT").replace(str(tmp_path), "/CWD")
    golden = GOLDEN / f"{name}.sh"
    if "MINITRON_WRITE_GOLDEN" in os.environ:
        golden.write_text(found)
    assert found == golden.read_text(), "MINITRON_WRITE_GOLDEN=1 writes it again; then read the difference"


FAKE_SBATCH = """#!/bin/sh
printf '%s\\n' "$MINITRON_PYTHON" "$@" --- >> "$LOG"
n=$(grep -c -- ^---$ "$LOG"); echo $((40 + n))
"""


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """A PATH with an sbatch that writes down its arguments and an sinfo with two partitions; returns the log."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "sbatch").write_text(FAKE_SBATCH)
    (folder / "sinfo").write_text("#!/bin/sh\nprintf 'batch\\nspot\\nbatch\\n'\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("LOG", str(folder / "log"))
    return folder / "log"


@pytest.mark.parametrize("name", ["one_job_32x8", "chain_32x8", "demo_lab", "demo_search_array"])
def test_the_printed_script_submits_the_same_as_the_launcher(name, slurm, capsys, tmp_path):
    arguments = [*RECIPES[name], f"output_dir={tmp_path}"]
    assert submit.main(["slurm", "--dry-run", *arguments]) == 0
    script = capsys.readouterr().out
    assert submit.main(["slurm", *arguments]) == 0
    by_launcher = slurm.read_text()
    slurm.unlink()
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert slurm.read_text() == by_launcher and by_launcher.count("---\n") == sum(
        script.count(f"job{number}=") for number in range(1, 5))
    assert done.stdout.split()[0] == "41"
    jobs = json.loads((load_config(arguments).run_dir / "jobs.json").read_text())
    assert [job["job"] for job in jobs] == done.stdout.split()


def test_the_jobs_of_a_chain_depend_on_each_other_and_never_overlap(slurm, tmp_path, capsys):
    assert submit.main(["slurm", *RECIPES["chain_32x8"], f"output_dir={tmp_path}"]) == 0
    calls = [part.splitlines() for part in slurm.read_text().split("---\n") if part]
    dependencies = [line for call in calls for line in call if line.startswith("--dependency")]
    assert dependencies == ["--dependency=singleton", "--dependency=afterok:41,singleton",
                            "--dependency=afterok:42,singleton"]
    assert len({line for call in calls for line in call if line.startswith("--job-name")}) == 1
    assert [line for call in calls for line in call if line.startswith("only=")] == [
        "only=[score]", "only=[prune]", "only=[distill,evaluate,report]"]
    assert "on 4 x 8 ranks" in capsys.readouterr().out


def test_a_search_as_job_arrays_has_one_for_each_rung_and_then_the_ranking(slurm, tmp_path, capsys):
    assert submit.main(["slurm", *RECIPES["demo_search_array"], f"output_dir={tmp_path}"]) == 0
    calls = [part.splitlines() for part in slurm.read_text().split("---\n") if part]

    def options(name):
        return [next((line.partition("=")[2] for line in call if line.startswith(f"--{name}=")), None)
                for call in calls]

    assert options("array") == [None, "0-8%4", "0-4%4", None]
    assert options("dependency") == ["singleton", "afterok:41", "afterok:42", "afterok:43,singleton"]
    first, rung1, rung2, last = options("job-name")
    assert first == last and (rung1, rung2) == (f"{first}-rung1", f"{first}-rung2")
    assert [call[call.index(f"{ROOT}/slurm/stage.sbatch") + 1 :][:2] for call in calls[1:3]] == [
        ["candidate", "rung=1"], ["candidate", "rung=2"]]
    assert [line for call in calls for line in call if line.startswith("only=")] == [
        "only=[score]", "only=[search,prune,distill,compare,evaluate,report]"]
    assert "rung 2, 5 candidates on 1 x 2 ranks; " in capsys.readouterr().out
    jobs = json.loads((tmp_path / "demo_search/jobs.json").read_text())
    assert [(job["job"], job.get("tasks"), job["log"].rpartition("/")[2]) for job in jobs] == [
        ("41", None, "41.log"), ("42", 9, "42_%a.log"), ("43", 5, "43_%a.log"), ("44", None, "44.log")]


def test_the_number_of_tasks_at_a_time_and_the_layout_of_a_job_with_a_search():
    score, candidates, ranking, rest = submit.chain(RECIPES["demo_search_chain"])
    assert (score.array, candidates.array, candidates.limit, ranking.array, rest.array) == (None, 9, 0, None, None)
    assert candidates.place == ranking.place == Placement(nodes=1, per_node=2), "the overrides of the search's job"
    assert "parallel.dp=2" in candidates.arguments and not any("only" in part for part in candidates.arguments)
    assert (ranking.stages, rest.stages[0]) == (("search",), "prune")
    assert [job.array for job in submit.chain(["experiment=demo_search", "cluster.search_array=null"])] == [None]
    assert [job.array for job in submit.chain(["experiment=demo", "cluster.search_array=3"])] == [None], "no search"


SEARCHED = RECIPES["demo_search_array"]


@pytest.mark.parametrize(("arguments", "words"), [
    ([*SEARCHED, "parallel.dp=2", "parallel.search_groups=2"], "cluster.search_array and parallel.search_groups"),
    ([*SEARCHED, "cluster.search_array=-1"], "zero or more.*cluster.search_array"),
    ([*SEARCHED, "teacher.path=/nowhere"], "/nowhere"),
    (["experiment=nemotron4_minitron", "cluster.search_array=2"], "no rounds.*cluster.search_array"),
])
def test_a_search_that_cannot_be_job_arrays_is_refused_in_one_line(arguments, words, capsys):
    assert submit.main(["slurm", "--dry-run", *arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(said)


def test_ranks_of_a_chain_s_jobs():
    score, prune, distill = submit.chain(RECIPES["chain_32x8"])
    assert [job.place for job in (score, prune, distill)] == [
        Placement(nodes=4, per_node=8), Placement(nodes=1, per_node=1), Placement(nodes=32, per_node=8)]
    assert score.config.cluster.time_limit == "1:00:00" and distill.config.cluster.time_limit == "04:00:00"


@pytest.mark.parametrize(("changes", "words"), [
    (["cluster.jobs=[{stages:[prune]},{stages:[score,distill,evaluate,report]}]"], "cluster.jobs"),
    (["cluster.jobs=[{stages:[score]}]"], "score, prune, distill.*cluster.jobs"),
    (["cluster.nodes=3"], "256 ranks.*3 nodes with 8"), (["parallel.dp=31", "cluster.nodes=null"], None),
    (["cluster.partition=bacth"], "batch, spot.*bacth.*cluster.partition"),
    (["cluster.container=/nowhere/m.sqsh"], "/nowhere/m.sqsh.*cluster.container"),
    (["cluster.mounts=[/nowhere:/models]"], "/nowhere:/models.*cluster.mounts"),
])
def test_mistakes(changes, words, slurm, capsys, tmp_path):
    code = submit.main(["slurm", *RECIPES["one_job_32x8"], f"output_dir={tmp_path}", *changes])
    said = capsys.readouterr()
    if words is None:
        assert code == 0 and "31 x 8" in said.out
        return
    assert code == 2 and len(said.err.splitlines()) == 1 and not slurm.exists()
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(said.err)


def test_slurm_not_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main(["slurm", *RECIPES["one_job_32x8"], f"output_dir={tmp_path}"]) == 2
    assert "Slurm is not installed" in capsys.readouterr().err


def test_what_sbatch_refuses_is_shown(slurm, tmp_path, capsys):
    (slurm.parent / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid qos specification' >&2\nexit 1\n")
    assert submit.main(["slurm", *RECIPES["one_job_32x8"], f"output_dir={tmp_path}"]) == 2
    assert "found Invalid qos specification" in capsys.readouterr().err


def test_results_in_one_node_s_memory(tmp_path, monkeypatch):
    mounts = (f"overlay / overlay rw 0 0\ntmpfs {tmp_path}/memory tmpfs rw 0 0\n"
              f"lustre {tmp_path}/memory/l lustre rw 0 0\n")
    monkeypatch.setattr(submit.Path, "read_text", lambda self, **_: mounts)
    (tmp_path / "memory/l").mkdir(parents=True)
    for folder, nodes, refused in (("memory/new", 2, True), ("memory/new", 1, False), ("memory/l/new", 2, False),
                                   ("new", 2, False)):
        config = Config(output_dir=str(tmp_path / folder))
        if refused:
            with pytest.raises(ConfigError, match=r"tmpfs at .*output_dir"):
                submit.check_output_dir(config, Placement(nodes=nodes, per_node=8))
        else:
            submit.check_output_dir(config, Placement(nodes=nodes, per_node=8))


def test_local_prints_the_command_and_its_ranks(capsys, tmp_path):
    found = dry_run("local", ["experiment=demo", "parallel.tp=2"], capsys, tmp_path)
    assert "-m nemo_minitron.cli experiment=demo parallel.tp=2 cluster.launcher=local\n" in found
    assert "--nproc-per-node 2" in found


def test_docker_on_a_dgx_node(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "ib").mkdir()
    arguments = [f"teacher.path={tmp_path}/model", "data.path=tokens", "parallel=dgx_h100", "cluster.gpus_per_node=8",
                 "+cluster.environment.NCCL_DEBUG=WARN", "cluster.mounts=[/raid:/raid]"]
    command = docker_command(load_config(arguments), arguments, infiniband=tmp_path / "ib",
                             environ={"HF_TOKEN": "hf_secret", "HF_HOME": "/cache", "OTHER": "x"})
    for part in ("--gpus=all", "--shm-size=32g", "--ulimit=memlock=-1", f"--device={tmp_path}/ib", "--env=HF_TOKEN",
                 f"--volume={tmp_path}/model:{tmp_path}/model:ro", "--volume=/cache:/cache", "--env=NCCL_DEBUG=WARN",
                 f"--volume={tmp_path}/outputs:{tmp_path}/outputs", "--volume=/raid:/raid",
                 f"data.path={tmp_path}/tokens", f"output_dir={tmp_path}/outputs", "cluster.launcher=local"):
        assert part in command, part
    assert not any("hf_secret" in part or "OTHER" in part for part in command)
    assert command.index("minitron") == command.index("nemo_minitron:latest") + 1


def test_docker_without_gpus(tmp_path):
    command = docker_command(load_config(["experiment=demo"]), ["experiment=demo", "output_dir=x"], environ={})
    assert not any(part.startswith(("--gpus", "--device", "--network")) for part in command)
    assert not any("sympy-llama" in part for part in command), "the teacher that comes with the package is in the image"
    assert "output_dir=x" not in command


@pytest.mark.parametrize("arguments", [[], ["elsewhere"], ["slurm", "experiment=nowhere"], ["docker", "a=b"]])
def test_usage_and_bad_arguments(arguments, capsys):
    assert submit.main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("place", ["local", "docker", "slurm"])
def test_the_scripts_run_and_pass_on_their_arguments(place, tmp_path):
    script = ROOT / "launchers" / place
    assert os.access(script, os.X_OK)
    done = subprocess.run([script, "--dry-run", "experiment=demo", "controls=[ce]"], cwd=tmp_path, text=True,
                          env=os.environ | {"MINITRON_PYTHON": sys.executable}, capture_output=True, check=False)
    assert done.returncode == 0 and "controls=[ce]" in done.stdout, done.stderr


def test_sbatch_files_are_sound():
    for path in (ROOT / "slurm").glob("*.sbatch"):
        subprocess.run(["bash", "-n", path], check=True)
        assert "nemo_minitron.cli" in path.read_text()


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "db_password"])
def test_a_secret_in_the_recipe_is_refused(name):
    with pytest.raises(ConfigError, match=rf"{name}.*cluster.environment"):
        load_config([f"+cluster.environment.{name}=abc"])


def test_a_cluster_that_does_not_fit_is_told_before_anything_is_submitted():
    with pytest.raises(LayoutError, match=r"cluster.gpus_per_node"):
        submit.chain(["cluster=dgx_h100_superpod", "parallel.tp=12"])
    submit.check_output_dir(load_config([]), Placement(nodes=2, per_node=1))
    assert ClusterConfig().launcher == "auto"
