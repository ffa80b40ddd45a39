"""`launchers/{local,docker,slurm}`: the same arguments as `minitron`, and `--dry-run` to see what would run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.checkpoint.families import read_arch
from nemo_minitron.cli import main as minitron
from nemo_minitron.compose import load_config
from nemo_minitron.config import ClusterConfig, Config
from nemo_minitron.errors import ConfigError, UserError
from nemo_minitron.launch import docker, sbatch
from nemo_minitron.launch.processes import Placement, local_command, placement
from nemo_minitron.launch.sbatch import Job
from nemo_minitron.stages.candidates import rung_sizes
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.initialize import initial_arch
from nemo_minitron.stages.registry import STAGES, asked_stages, wanted_stages

ROOT = Path(__file__).resolve().parents[1]
NODE_LOCAL = ("tmpfs", "ramfs", "overlay", "squashfs")
"""File systems that no other node can see."""


def main(arguments: list[str] | None = None) -> int:
    """`python -m nemo_minitron.submit PLACE [--dry-run] ARGUMENTS`; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    places: dict[str, Callable[[list[str], bool], int]] = {"local": local, "docker": in_docker, "slurm": in_slurm}
    if not arguments or arguments[0] not in places:
        print(f"usage: launchers/PLACE [--dry-run] [experiment=NAME] [key=value ...]; PLACE: {', '.join(places)}",
              file=sys.stderr)
        return 2
    rest = [argument for argument in arguments[1:] if argument != "--dry-run"]
    if rest[:1] == ["run"]:
        rest = rest[1:]
    try:
        return places[arguments[0]](rest, len(rest) < len(arguments) - 1 and "--dry-run" in arguments)
    except UserError as error:
        print(f"launchers/{arguments[0]}: {error}", file=sys.stderr)
        return 2


def local(arguments: list[str], dry_run: bool) -> int:
    """`minitron` here, its ranks under torchrun."""
    config = load_config([*arguments, "cluster.launcher=local"])
    if not dry_run:
        return minitron([*arguments, "cluster.launcher=local"])
    print(shlex.join([sys.executable, "-m", "nemo_minitron.cli", *arguments, "cluster.launcher=local"]))
    context = Context(config=config)
    if any(STAGES[stage].ranks for stage in asked_stages(context)):
        ranks = local_command(context.layout.world_size, [str(config.run_dir.absolute() / "job")])
        print("# which starts, where a stage is due that all ranks run:\n# " + shlex.join(ranks))
    return 0


def in_docker(arguments: list[str], dry_run: bool) -> int:
    """`minitron` in a container on this machine.

    Raises:
        ConfigError: there is no Docker.
    """
    config = load_config(arguments)
    command = docker.docker_command(config, arguments)
    if dry_run:
        print(docker.shown(command))
        return 0
    if shutil.which("docker") is None:
        raise ConfigError("Docker is not installed here", expected="docker in PATH", found="none")
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)  # Docker would make it, as root
    return subprocess.run(command, check=False).returncode


def in_slurm(arguments: list[str], dry_run: bool) -> int:
    """Submit the recipe: one job, or the chain of `cluster.jobs`, each after the one before; a search as job arrays.

    Raises:
        UserError: a cluster, layout or folder that does not fit; what sbatch refuses.
    """
    jobs = chain(arguments)
    directory = Path.cwd()
    if dry_run:
        print(sbatch.shown(jobs, root=ROOT, directory=directory, python=sys.executable))
        return 0
    for job in jobs:
        check_cluster(job.config.cluster)
        check_output_dir(job.config, job.place)
    config = jobs[0].config
    (config.run_dir / "slurm").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"MINITRON_PYTHON": sys.executable}
    before: str | None = None
    for job in jobs:
        command = sbatch.sbatch_command(job, after=before, root=ROOT, directory=directory)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError("sbatch refused a job", expected=f"{shlex.join(command)} to be accepted", key="cluster",
                            found=done.stderr.strip().removeprefix("sbatch: error: "))
        before = done.stdout.strip().partition(";")[0]
        log = sbatch.log_pattern(job, before)
        _record(config, before, job, log)
        print(f"job {before}: {job.what} on {job.place.nodes} x {job.place.per_node} ranks; {log}")
    return 0


def chain(arguments: list[str]) -> list[Job]:
    """The jobs of a recipe, each with its own layout and the stages it runs.

    Raises:
        ConfigError: a wanted stage that no job runs, or one that comes after a stage that needs it.
        LayoutError: a layout that does not fit its nodes.
    """
    config = load_config(arguments)
    wanted = wanted_stages(Context(config=config))
    searched = [round_.name for round_ in config.rounds if round_.search is not None]
    if searched and config.cluster.search_array is not None:
        raise ConfigError("the searches of rounds are not run as job arrays", found=", ".join(searched),
                          expected="null, or no rounds with a search", key="cluster.search_array")
    parts = [(tuple(part.stages), tuple(part.overrides)) for part in config.cluster.jobs] or [((), ())]
    named = [stage for stages, _ in parts for stage in stages]
    if config.cluster.jobs and named != wanted:
        raise ConfigError("the jobs do not make up the recipe", expected=f"{', '.join(wanted)}, in this order",
                          found=", ".join(named), key="cluster.jobs")
    jobs: list[Job] = []
    for stages, overrides in parts:
        own = [*arguments, *overrides]
        if "search" in (stages or wanted) and config.cluster.search_array is not None:
            jobs += _search_jobs(own, list(stages or wanted))
        else:
            jobs.append(_job(own, stages))
    return jobs


def _job(arguments: list[str], stages: Sequence[str]) -> Job:
    """One job of the chain, for `stages`; all of the recipe's where there are none."""
    own = [*arguments, *([f"only=[{','.join(stages)}]"] if stages else [])]
    config = load_config(own)
    context = Context(config=config)
    asked = asked_stages(context)
    ranks = any(STAGES[stage].ranks for stage in asked)
    place = placement(config.cluster, context.layout.world_size) if ranks else Placement(nodes=1, per_node=1)
    return Job(stages=tuple(asked), config=config, place=place, arguments=tuple(own))


def _search_jobs(arguments: list[str], stages: list[str]) -> list[Job]:
    """A job of `stages` with a search in parts: what comes before, an array for each rung, the ranking and the rest.

    Raises:
        ConfigError: groups side by side are asked for as well.
        CheckpointError: the model that is pruned is not there to tell which candidates there are.
    """
    config, at = load_config(arguments), stages.index("search")
    if config.parallel.search_groups > 1:
        raise ConfigError("candidates side by side twice", expected="a job array or groups within a job", found="both",
                          key="cluster.search_array and parallel.search_groups")
    context = Context(config=config)
    source = initial_arch(config.model) if "initialize" in config.stages else read_arch(context.start_path())
    place = placement(config.cluster, context.layout.world_size)
    arrays = [Job(stages=("search",), config=config, place=place, array=size, limit=config.cluster.search_array or 0,
                  rung=rung, arguments=("candidate", f"rung={rung}", *arguments))
              for rung, size in enumerate(rung_sizes(config, source), 1)]
    before = [_job(arguments, stages[:at])] if at else []
    return [*before, *arrays, _job(arguments, stages[at:])]


def check_cluster(cluster: ClusterConfig) -> None:
    """Raise `ConfigError` for a partition, container or mount that is not there, or no Slurm at all."""
    if shutil.which("sbatch") is None:
        raise ConfigError("Slurm is not installed here", expected="sbatch and sinfo in PATH, as on a login node",
                          found="none", key="cluster, or use launchers/local")
    if cluster.partition is not None:
        done = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError("Slurm does not answer", expected="sinfo to list partitions", found=done.stderr.strip())
        known = sorted(set(done.stdout.split()))
        if cluster.partition not in known:
            raise ConfigError("unknown partition", expected=f"one that sinfo offers: {', '.join(known)}",
                              found=cluster.partition, key="cluster.partition")
    image = cluster.container
    if image is not None and (image.startswith((".", "/")) or image.endswith(".sqsh")) and not Path(image).is_file():
        raise ConfigError("no such container", expected="a .sqsh file, or an image as USER@REGISTRY#IMAGE:TAG",
                          found=image, key="cluster.container")
    for mount in cluster.mounts:
        if not Path(mount.partition(":")[0]).exists():
            raise ConfigError("a folder to mount is not there", expected="SOURCE:TARGET", found=mount,
                              key="cluster.mounts")


def check_output_dir(config: Config, place: Placement) -> None:
    """Raise `ConfigError` where results of several nodes would go to the memory of one of them."""
    folder = Path(config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    found = _file_system(folder, Path("/proc/mounts").read_text())
    if place.nodes > 1 and found in ("tmpfs", "ramfs"):
        raise ConfigError("results would go to one node's own memory", expected="a file system that all nodes share",
                          found=f"{found} at {folder}", key="output_dir")


def _file_system(folder: Path, mounts: str) -> str:
    """Type of the file system that `folder` is on, from the text of /proc/mounts."""
    best, kind = "", ""
    for line in mounts.splitlines():
        _, point, found = line.split()[:3]
        if folder.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind


def _record(config: Config, number: str, job: Job, log: str) -> None:
    """Add a job to the run's `jobs.json`, for `minitron status`."""
    path = config.run_dir / "jobs.json"
    jobs = read_json(path) if path.exists() else []
    submitted = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    tasks = {} if job.array is None else {"tasks": job.array, "rung": job.rung}
    write_json(path, [*jobs, {"job": number, "stages": list(job.stages), "submitted": submitted, "log": log, **tasks}])


if __name__ == "__main__":
    sys.exit(main())
