"""`docker run` on one node. Pure, but for looking which folders exist."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.config import Config

IMAGE = "nemo_minitron:latest"
PASSED_ON = ("HF_TOKEN", "HF_HOME", "WANDB_API_KEY", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG")
"""Variables that reach the container by name, so that no value stands in a command line."""


def docker_command(config: Config, arguments: list[str], *, environ: Mapping[str, str] = os.environ,
                   infiniband: Path = Path("/dev/infiniband")) -> list[str]:
    """`docker run` of `minitron` with the same arguments; every folder is mounted where it is outside.

    GPUs, locked memory and InfiniBand only where the recipe has GPUs (`cluster.gpus_per_node`).
    """
    cluster = config.cluster
    command = ["docker", "run", "--rm", "--init", f"--user={os.getuid()}:{os.getgid()}"]
    if cluster.gpus_per_node:
        every = cluster.gpus_per_node == config.parallel.tp * config.parallel.pp * config.parallel.dp
        command += ["--gpus=all" if every else f"--gpus={config.parallel.tp * config.parallel.pp * config.parallel.dp}"]
        # NCCL pins memory for RDMA and shares buffers between ranks in /dev/shm; Docker's 64 MB and 64 KB are too small
        command += ["--ulimit=memlock=-1", "--ulimit=stack=67108864", "--shm-size=32g", "--network=host"]
        if infiniband.is_dir():
            command += [f"--device={infiniband}", "--cap-add=IPC_LOCK"]
    else:
        command += ["--shm-size=2g"]
    output_dir = Path(config.output_dir).absolute()
    command += [f"--volume={output_dir}:{output_dir}"]
    read = [config.teacher.path, config.data.path, *(source.path for source in config.data.blend), config.prune.scores,
            config.distill.cache]
    for name in dict.fromkeys(path for path in read if path is not None):
        path = Path(name).absolute()
        folder = path if path.exists() else path.parent  # data.path may be the beginning of .bin and .idx
        if folder.exists() and output_dir not in (folder, *folder.parents) and not _is_shipped(folder):
            command.append(f"--volume={folder}:{folder}:ro")
    if "HF_HOME" in environ:
        command.append(f"--volume={environ['HF_HOME']}:{environ['HF_HOME']}")
    command += [f"--volume={mount}" for mount in cluster.mounts]
    command += [f"--env={name}={value}" for name, value in cluster.environment.items()]
    command += [f"--env={name}" for name in PASSED_ON if name in environ]
    paths = {"teacher.path": config.teacher.path, "data.path": config.data.path}
    typed = {argument.partition("=")[0] for argument in arguments}
    absolute = [f"{key}={Path(path).absolute()}" for key, path in paths.items() if key in typed and path is not None]
    replaced = {"output_dir", *(argument.partition("=")[0] for argument in absolute)}
    kept = [argument for argument in arguments if argument.partition("=")[0] not in replaced]
    return [*command, cluster.container or IMAGE, "minitron", *kept, *absolute, f"output_dir={output_dir}",
            "cluster.launcher=local"]


def _is_shipped(folder: Path) -> bool:
    """Whether the folder is part of this package, and so in the image."""
    return folder.is_relative_to(Path(__file__).resolve().parents[2])


def shown(command: list[str]) -> str:
    """One option a line."""
    return " \\\n    ".join(shlex.quote(part) for part in command)
