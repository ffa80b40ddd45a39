"""`minitron status outputs/NAME`: how far a run is, from its files alone, so that it works on a login node."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import read_json
from nemo_minitron.config_rounds import SearchConfig
from nemo_minitron.errors import UserError
from nemo_minitron.launch.workers import VERDICT

ROUND = "round1"
RATE_LINES = 50
"""Steps that the speed, and with it the time left, is taken from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageStatus:
    """One stage. `state` is done, running, stopped or waiting; seconds are of work, `eta_s` of what is left.

    Of a search, `step` and `steps` count candidates, those that are done and those that were begun, and `at_work` names
    the ones that some job is at; an array's tasks are jobs of their own.
    """

    name: str
    state: str
    step: int | None = None
    steps: int | None = None
    seconds: float | None = None
    eta_s: float | None = None
    loss: float | None = None
    resume_step: int | None = None
    at_work: tuple[str, ...] = ()


def status(arguments: list[str]) -> None:
    """Print the state of the run in the folder that `arguments` name; with `--json` as one JSON object.

    Raises:
        UserError: no such run.
    """
    folders = [argument for argument in arguments if argument != "--json"]
    if len(folders) != 1:
        raise UserError("which run?", expected="minitron status outputs/NAME [--json]", found=" ".join(arguments))
    found = run_status(Path(folders[0]), now=time.time())
    print(json.dumps(found, indent=2) if "--json" in arguments else shown(found))


def run_status(run_dir: Path, *, now: float) -> dict[str, Any]:
    """State of the run and of its stages, its jobs and its last error, as plain data. `now` is in seconds since 1970.

    Raises:
        UserError: `run_dir` is no run.
    """
    import yaml

    if not (run_dir / "config.yaml").is_file():
        raise UserError("no run there", expected="a folder outputs/NAME with config.yaml", found=str(run_dir))
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    job = _job(run_dir)
    running = job is not None and _held(run_dir / ".lock")
    rounds = {str(round_["name"]): bool(round_.get("search")) for round_ in config.get("rounds") or []}
    parts = rounds or {ROUND: _searches(config)}
    current = job.get("round", ROUND) if job is not None else ROUND
    due = [f"{current}/{name}" if rounds else name for name in (job["stages"] if job is not None else [])]
    stages = [_stage(run_dir / part / name, shown_name, running=running and shown_name in due)
              for part, searched in parts.items() for name in _wanted(config, searched)
              for shown_name in [f"{part}/{name}" if rounds else name]
              if not (part in [*rounds][1:] and name in ("initialize", "correct"))]
    if running and not any(stage.state == "running" for stage in stages):  # between two stages
        stages = [dataclasses.replace(stage, state="running") if stage.name == _next(stages, due) else stage
                  for stage in stages]
    last_sign = max((path.stat().st_mtime for path in run_dir.rglob("*") if path.is_file()), default=None)
    busy = running or any(stage.at_work for stage in stages)
    return {"run": str(run_dir), "state": _state(stages, busy), "stages": [vars(stage) for stage in stages],
            "jobs": read_json(run_dir / "jobs.json") if (run_dir / "jobs.json").exists() else [],
            "slurm_job": job.get("slurm_job") if running and job is not None else None,
            "last_sign_s": None if last_sign is None else round(max(now - last_sign, 0.0), 1),
            "error": None if busy else _error(run_dir / "job")}


def _searches(config: dict[str, Any]) -> bool:
    """Whether the recipe, one without rounds, has a search."""
    return _differs(config.get("search", {}), dataclasses.asdict(SearchConfig()))


def _differs(found: Any, default: Any) -> bool:
    """Whether a value of the file is not the default; an older file has fewer keys."""
    if isinstance(found, dict) and isinstance(default, dict):
        return any(_differs(value, default.get(name)) for name, value in found.items())
    return bool(found != default)


def _wanted(config: dict[str, Any], searched: bool) -> list[str]:
    """Stages and controls of a round, with those that a search adds."""
    wanted = [*config["stages"], *config.get("controls", [])]
    if searched and "prune" in wanted:
        wanted.insert(wanted.index("prune"), "search")
    if searched and "distill" in wanted and config["search"].get("compare"):
        wanted.insert(wanted.index("distill") + 1, "compare")
    return wanted


def _job(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "job" / "job.json"
    found: dict[str, Any] | None = read_json(path) if path.exists() else None
    return found


def _held(lock: Path) -> bool:
    """Whether a run holds the lock (`flock`, which reaches other nodes where the file system passes it on)."""
    import fcntl

    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _state(stages: list[StageStatus], running: bool) -> str:
    if all(stage.state == "done" for stage in stages):
        return "done"
    if running:
        return "running"
    return "stopped" if any(stage.state in ("done", "stopped") for stage in stages) else "waiting"


def _next(stages: list[StageStatus], due: list[str]) -> str | None:
    return next((stage.name for stage in stages if stage.state != "done" and stage.name in due), None)


def _stage(directory: Path, name: str, *, running: bool) -> StageStatus:
    """State of one stage from its folder; `running` says whether the run at work may be working on it."""
    if (directory / "manifest.json").exists():
        manifest = read_json(directory / "manifest.json")
        steps = manifest["result"].get("steps")
        return StageStatus(name=name, state="done", step=steps, steps=steps, seconds=manifest["times"]["seconds"])
    if name.rpartition("/")[2] == "search":
        return _search(directory, name, running=running)
    if not (directory / "started.json").exists():
        return StageStatus(name=name, state="waiting")
    state = "running" if running else "stopped"
    directory = _at_work(directory)
    lines = _lines(directory / "metrics.jsonl")
    total = read_json(directory / "progress.json")["steps"] if (directory / "progress.json").exists() else None
    points = sorted(directory.glob("resume/step_*/complete.json"))
    resume = int(points[-1].parent.name.removeprefix("step_")) if points else None
    if not lines:
        return StageStatus(name=name, state=state, steps=total, resume_step=resume)
    first, last = lines[max(len(lines) - RATE_LINES, 0)], lines[-1]
    done = last["step"] - first["step"]
    rate = (last["seconds"] - first["seconds"]) / done if done > 0 else None
    eta = None if rate is None or total is None else round(rate * (total - last["step"]), 1)
    return StageStatus(name=name, state=state, step=last["step"], steps=total, seconds=last["seconds"], eta_s=eta,
                       loss=last["loss"], resume_step=resume)


def _search(directory: Path, name: str, *, running: bool) -> StageStatus:
    """Of a search that is not done, by the folders of its candidates; a job holds a lock on the one that it is at."""
    begun = sorted({path.parents[1] for path in directory.glob("*/*/started.json")})
    if not begun:
        return StageStatus(name=name, state="running" if running else "waiting")
    at_work = tuple(folder.name for folder in begun if _held(folder / ".lock"))
    done = sum((folder / "distill" / "manifest.json").exists() for folder in begun)
    return StageStatus(name=name, state="running" if running or at_work else "stopped", step=done, steps=len(begun),
                       at_work=at_work)


def _at_work(directory: Path) -> Path:
    """The stage's folder; of an alignment, that of the training that it is at."""
    begun = sorted(directory.glob("*/progress.json"), key=lambda path: path.stat().st_mtime)
    return begun[-1].parent if begun else directory


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of training steps, without one that is being written."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "loss" in line:
            lines.append(line)
    return lines


def _error(job_dir: Path) -> str | None:
    """The last line of what the ranks left when they ended early."""
    if (job_dir / VERDICT).exists():
        return str(read_json(job_dir / VERDICT)["message"])
    records = [read_json(path) for path in sorted(job_dir.glob("error_*.json"))]
    if not records:
        stopped = sorted(job_dir.glob("stopped_*.json"))  # their launcher had no time for a verdict
        return str(read_json(stopped[0])["message"]) if stopped else None
    first = min(records, key=lambda record: (record["kind"] != "user", record["time"]))
    return f"rank {first['rank']}: " + str(first.get("message") or first["traceback"].strip().splitlines()[-1])


def shown(found: dict[str, Any]) -> str:
    """A few lines for people."""
    head = f"{found['run']}: {found['state']}"
    if found["slurm_job"]:
        head += f" (Slurm job {found['slurm_job']})"
    if found["last_sign_s"] is not None and found["state"] != "done":
        head += f", last sign of life {_duration(found['last_sign_s'])} ago"
    lines = [head]
    width = max([12, *(len(stage["name"]) for stage in found["stages"])])
    for stage in found["stages"]:
        line = f"  {stage['name']:<{width}}  {stage['state']:<9}"
        if stage["name"].rpartition("/")[2] == "search" and stage["state"] != "done":
            if stage["steps"]:
                line += f" {stage['step']} candidates done of {stage['steps']} begun"
            if stage["at_work"]:
                line += f"; at work: {', '.join(stage['at_work'])}"
        elif stage["step"] is not None:
            line += f" step {stage['step']}" + (f"/{stage['steps']}" if stage["steps"] else "")
        if stage["seconds"] is not None:
            line += f"  {_duration(stage['seconds'])}"
        if stage["state"] != "done":
            if stage["eta_s"] is not None:
                line += f"  ETA {_duration(stage['eta_s'])}"
            if stage["loss"] is not None:
                line += f"  loss {stage['loss']:.4f} nats/token"
            if stage["resume_step"] is not None:
                line += f"  resume point of step {stage['resume_step']}"
        lines.append(line.rstrip())
    lines += [f"  job {job['job']}: {', '.join(job['stages'])}; submitted {job['submitted']}; {job['log']}"
              for job in found["jobs"]]
    if found["error"]:
        lines.append(f"  {found['error']}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
