"""The candidates of a search side by side: the stage's trainings, in jobs that run at the same time.

Groups on this job's own ranks: the process that started the run divides the candidates of each rung over them, and
waits for all before it looks who goes on. Or tasks of a Slurm job array, one a candidate, which know nothing of each
other. The stage itself then finds the candidates trained. No rank runs this.
"""

from __future__ import annotations

from nemo_minitron.config import Config
from nemo_minitron.errors import ConfigError
from nemo_minitron.launch.side_by_side import run_side_by_side
from nemo_minitron.launch.workers import run_workers
from nemo_minitron.stages.candidates import candidates_in
from nemo_minitron.stages.context import Context


def train_side_by_side(config: Config, context: Context, lock: int) -> None:
    """Train what is missing of every candidate of a round of the recipe `config`.

    Raises:
        UserError, Stopped, WorkerError: as `launch.workers.run_workers`.
    """
    candidates, groups = candidates_in(context), config.parallel.search_groups
    for rung, end in enumerate(candidates.ends):
        missing = [name for name in candidates.at_rung(rung) if not candidates.is_through(name, rung)]
        if not missing:
            continue
        print(f"== {len(missing)} candidates up to step {end}, {min(groups, len(missing))} at a time", flush=True)
        parts = [missing[first::groups] for first in range(min(groups, len(missing)))]
        run_side_by_side(config, [{"candidates": names, "rung": rung} for names in parts], command=context.command,
                         lock=lock, round_name=context.part)


def train_one(config: Config, context: Context, *, rung: int, task: int, lock: int) -> None:
    """Train one candidate of a round to the end of a rung: number `task` of those that are left there, both from 0.

    Raises:
        ConfigError: there is no such rung or task.
        UserError: the rung before is not finished.
        UserError, Stopped, WorkerError: as `launch.workers.run_workers`.
    """
    candidates = candidates_in(context)
    if not 0 <= rung < len(candidates.ends):
        raise ConfigError("no such rung of the search", expected=f"1 to {len(candidates.ends)}", found=str(rung + 1),
                          key="rung")
    names = candidates.at_rung(rung)
    if not 0 <= task < len(names):
        raise ConfigError("no such candidate", expected=f"0 to {len(names) - 1}", found=str(task),
                          key="task (or SLURM_ARRAY_TASK_ID)")
    name = names[task]
    if candidates.is_through(name, rung):
        print(f"already done: {name} up to step {candidates.ends[rung]}", flush=True)
        return
    run_workers(config, ["search"], processes=context.layout.world_size, command=context.command, lock=lock,
                round_name=context.part, part={"candidates": [name], "rung": rung}, folder=name)
