"""A rank for the tests of `launch.watch`: joins a gloo group, and in step 7 does what its arguments say.

Arguments: job folder, rank, world size, stall_s, what rank 1 does (sleep or fail); the others wait for it in an
all-reduce.
"""

import datetime
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_minitron.launch import standing
from nemo_minitron.launch.rank_log import RankLog
from nemo_minitron.launch.watch import Watch, leave_record, wait_for_others


def stuck() -> None:
    """Never comes to the collective."""
    time.sleep(600)


def main() -> None:
    """Returns only where the watch failed to end this process."""
    job_dir, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{job_dir}/store", rank=rank, world_size=world_size,
                            timeout=datetime.timedelta(seconds=300))
    RankLog(job_dir.parent / "logs", rank).turn_to("distill")
    Watch(job_dir, rank=rank, world_size=world_size, stall_s=float(sys.argv[4])).start()
    standing.enter("distill")
    value = torch.ones(4)
    for step in range(1, 8):
        standing.begin_step(step)
        if step == 7 and rank == 1:
            if sys.argv[5] == "fail":
                leave_record(job_dir, "error", {"kind": "failure", "rank": 1, "traceback": "ValueError: planted",
                                                "where": "rank 1: planted"})
                wait_for_others(job_dir, world_size)
                os._exit(1)
            stuck()
        dist.all_reduce(value)
        standing.rest()
    print("all steps are done", flush=True)


if __name__ == "__main__":
    main()
