"""Sends the meters of a training to Weights & Biases and to MLflow, where `train.loggers` names them.

Training never waits for them and does not end with them: each has a thread of its own, which tries again while its
server is away. A stage's run keeps its id in `loggers.json` beside `metrics.jsonl`, so that a training that goes on
goes on in the same run; steps that a kill lost and that are done again are sent again. Keys and addresses come from the
environment, as both packages read them, and are taken out of whatever is printed here.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.errors import ConfigError

PROJECT = "nemo_minitron"
"""W&B's project and MLflow's experiment, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another."""
RETRY_S = 30.0
"""Seconds between two tries while a server is away."""
LAST_S = {"finished": 60.0, "stopped": 10.0, "failed": 10.0}
"""Seconds that the end of a training waits for what is not sent yet: after a failure the other ranks wait too."""
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)

Line = tuple[int, dict[str, float]]
"""A step, from 1, and its meters by name."""


def check_loggers(names: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """Find what is missing before anything starts.

    Raises:
        ConfigError: a package that is not installed, no key of W&B, no address of MLflow.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"{name} is not installed", expected=f"pip install {_PACKAGES[name]}",
                              found="no such package", key="train.loggers")
    offline = environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
    if "wandb" in names and not offline and not environ.get("WANDB_API_KEY"):
        raise ConfigError("no key for Weights & Biases", found="neither", key="train.loggers",
                          expected="WANDB_API_KEY or WANDB_MODE=offline in the environment")
    if "mlflow" in names and not environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError("no server for MLflow", expected="MLFLOW_TRACKING_URI in the environment", found="none",
                          key="train.loggers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is tracked: `title` is NAME/round/stage, `directory` the stage's own, `parameters` are plain data."""

    title: str
    label: str
    directory: Path
    parameters: dict[str, Any]

    @property
    def group(self) -> str:
        """The runs of one recipe are together."""
        return self.title.split("/")[0]

    def known_id(self, name: str) -> str | None:
        """Of the stage's run so far, or None."""
        path = self.directory / "loggers.json"
        return read_json(path).get(name) if path.exists() else None

    def keep_id(self, name: str, run_id: str) -> None:
        """For the training that goes on from this one."""
        path = self.directory / "loggers.json"
        with _IDS:
            write_json(path, (read_json(path) if path.exists() else {}) | {name: run_id})


_IDS = threading.Lock()


class Run(Protocol):
    """An open run of one of the services."""

    def send(self, lines: list[Line]) -> None:
        """Send some steps."""

    def finish(self, state: str) -> None:
        """End it: finished, stopped (it will go on) or failed."""


class WandbRun:
    """A run of Weights & Biases, without the console, code and git address that the package would send besides."""

    def __init__(self, subject: Subject) -> None:
        """Go on with the stage's run, or begin it."""
        import wandb

        run_id = subject.known_id("wandb") or uuid.uuid4().hex[:16]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), group=subject.group, name=subject.title,
            job_type=subject.label, id=run_id, resume="allow", dir=str(subject.directory), config=subject.parameters,
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_meta=True,
                                    silent=True))
        subject.keep_id("wandb", run_id)
        self._run.define_metric("step")  # its own counter refuses a step that is done again
        self._run.define_metric("*", step_metric="step")

    def send(self, lines: list[Line]) -> None:
        """Hand over to the package's own process."""
        for step, values in lines:
            self._run.log(values | {"step": step})

    def finish(self, state: str) -> None:
        """Waits until all is sent."""
        self._run.finish(exit_code=0 if state == "finished" else 1)


class MlflowRun:
    """A run of MLflow."""

    def __init__(self, subject: Subject) -> None:
        """Go on with the stage's run, or begin it."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        run_id = subject.known_id("mlflow")
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
            created = self._client.create_run(experiment, run_name=subject.title,
                                              tags={"group": subject.group, "stage": subject.label})
            run_id = str(created.info.run_id)
            subject.keep_id("mlflow", run_id)
            self._client.log_batch(run_id, params=[Param(key, str(value)) for key, value in _flat(subject.parameters)])
        self._run_id = run_id

    def send(self, lines: list[Line]) -> None:
        """One request for every 1000 numbers, which is what a server takes."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for step, values in lines for key, value in values.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])

    def finish(self, state: str) -> None:
        """Set its status."""
        self._client.set_terminated(self._run_id, {"finished": "FINISHED", "stopped": "KILLED"}.get(state, "FAILED"))


_RUNS: dict[str, Callable[[Subject], Run]] = {"wandb": WandbRun, "mlflow": MlflowRun}


class Trackers:
    """The services of a training, on rank 0."""

    def __init__(self, names: Sequence[str], subject: Subject) -> None:
        """Nothing begins before the first `log`: NeMo copies what a trainer is made of, and threads cannot be."""
        self._names = tuple(names)
        self._subject = subject
        self._senders: list[_Sender] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a step's meters when there is time for it; the first time, begin or go on with a run of each."""
        if not self._senders:
            self._senders = [_Sender(name, self._subject) for name in self._names]
        for sender in self._senders:
            sender.lines.put((step, dict(values)))

    def close(self, state: str) -> None:
        """End the runs: finished, stopped or failed; waits at most LAST_S[state] for what is not sent yet."""
        for sender in self._senders:
            sender.end(state)
        deadline = time.monotonic() + LAST_S[state]
        for sender in self._senders:
            sender.join(max(deadline - time.monotonic(), 0.0))
            if sender.is_alive():
                sender.say("not all was sent in time")
        self._senders = []


class _Sender(threading.Thread):
    """Sends what is in `lines` to one service, again and again until it is there."""

    def __init__(self, name: str, subject: Subject) -> None:
        super().__init__(name=f"to {name}", daemon=True)
        self.lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._service = name
        self._subject = subject
        self._state = "finished"
        self._ended = threading.Event()
        self._run: Run | None = None
        self.start()

    def say(self, text: str) -> None:
        print(f"[{self._subject.label}] {self._service}: {without_secrets(text)}", flush=True)

    def end(self, state: str) -> None:
        self._state = state
        self._ended.set()
        self.lines.put(None)

    def run(self) -> None:
        waiting: list[Line] = []
        said = last = False
        while not last:
            last = self._take(waiting)
            try:
                if self._run is None:
                    self._run = _RUNS[self._service](self._subject)
                self._run.send(waiting)
                waiting.clear()
                said = False
                if last:
                    self._run.finish(self._state)
            except Exception as error:  # whatever the service's package raises is no reason to end a training
                if last:
                    self.say(f"{type(error).__name__}: {error}; steps that were not sent: {len(waiting)}")
                elif not said:
                    self.say(f"{type(error).__name__}: {error}; training goes on, and it is tried again")
                    said = True
                self._ended.wait(RETRY_S)

    def _take(self, waiting: list[Line]) -> bool:
        """Move all that is there to `waiting`, after waiting for something to be there; whether it is the last."""
        line = self.lines.get()
        while line is not None:
            waiting.append(line)
            if self.lines.empty():
                return False
            line = self.lines.get()
        return True


def numbers(line: Mapping[str, Any], label: str) -> dict[str, float]:
    """The numbers of a line of meters but its step, as LABEL/NAME; text stays in `metrics.jsonl`."""
    return {f"{label}/{name}": float(value) for name, value in line.items()
            if name != "step" and isinstance(value, int | float)}


def without_secrets(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` in one line, without the values of the environment's keys and what stands before the @ of an address."""
    for name, value in environ.items():
        if _SECRET.search(name) and len(value) > 5:
            text = text.replace(value, "***")
    return " ".join(re.sub(r"//[^/\s@]+@", "//***@", text).split())


def _flat(data: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    return [pair for key, value in data.items()
            for pair in (_flat(value, f"{before}{key}.") if isinstance(value, dict) else [(before + key, value)])]
