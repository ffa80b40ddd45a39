"""One rank: joins the process groups once, then runs the stages of the job one after another."""

from __future__ import annotations

import ctypes
import datetime
import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.errors import UserError


def main() -> int:
    """Run `job.json` in the folder given as the only argument; leave `error_RANK.json` there when it fails."""
    job_dir = Path(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))
    # torchrun puts each rank into a session of its own; one that outlived a killed torchrun would write into the next
    # run of the same name
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    if os.getppid() == 1:  # it had died before
        return 1
    faulthandler.register(signal.SIGUSR1)
    try:
        _run(read_json(job_dir / "job.json"), rank)
    except UserError as error:
        record = {"kind": "user", "rank": rank, "message": str(error), "time": time.time()}
        write_json(job_dir / f"error_{rank}.json", record)
        return 2
    except BaseException:
        record = {"kind": "failure", "rank": rank, "traceback": traceback.format_exc(), "time": time.time()}
        write_json(job_dir / f"error_{rank}.json", record)
        raise
    return 0


def _run(job: dict[str, Any], rank: int) -> None:
    from nemo_minitron.parallel.cpu import open_cpu_door

    open_cpu_door()
    _quieten()
    import torch
    import torch.distributed as dist

    from nemo_minitron.compose import config_from_dict
    from nemo_minitron.parallel import groups
    from nemo_minitron.stages.context import Context
    from nemo_minitron.stages.execute import execute

    config = config_from_dict(job["config"])
    layout = Context(config=config).layout
    groups.start(layout, timeout_s=config.parallel.timeout_s)
    groups.seed_everything(config.seed)
    # rank 0 may tokenize or hash for long while the others wait: not within the bounds of a model's collectives
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=24))

    def share(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=patient, device=torch.device("cpu"))
        return box[0]

    execute(Context(config=config, rank=rank, share=share, command=job["command"],
                    barrier=lambda: dist.barrier(group=patient)), job["stages"])
    groups.stop()


def _quieten() -> None:
    """NeMo, Megatron and Lightning announce themselves at length; our own lines are the ones to read."""
    warnings.filterwarnings("ignore")
    for name in ("nemo_logger", "lightning.pytorch", "lightning", "megatron", "torch.distributed", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # gloo's threads can hold up an ordinary exit after a failure on another rank
