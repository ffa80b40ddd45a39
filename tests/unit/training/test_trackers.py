import copy
import sys
import time
import types
from importlib.util import find_spec

import pytest

from nemo_minitron.artifacts import read_json
from nemo_minitron.errors import ConfigError
from nemo_minitron.training import trackers
from nemo_minitron.training.trackers import Subject, Trackers, check_loggers, numbers, without_secrets

KEY = "0123456789secret"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed(name, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed; expected pip install {name}.*train\.loggers"):
        check_loggers([name], {})
    check_loggers([], {})


def test_a_key_or_an_address_that_is_missing(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda package: package)
    for name, variable in (("wandb", "WANDB_API_KEY"), ("mlflow", "MLFLOW_TRACKING_URI")):
        with pytest.raises(ConfigError, match=rf"expected {variable}.* in the environment.*train\.loggers"):
            check_loggers([name], {})
        check_loggers([name], {variable: "there"})
    check_loggers(["wandb"], {"WANDB_MODE": "offline"})


def test_secrets_are_taken_out():
    text = f"GET https://me:{KEY}@server/api\nwith {KEY} failed"
    assert without_secrets(text, {}) == f"GET https://***@server/api with {KEY} failed"
    assert without_secrets(text, {"WANDB_API_KEY": KEY}) == "GET https://***@server/api with *** failed"


def test_the_numbers_of_a_line():
    line = {"step": 5, "tokens": 640, "loss": 0.5, "phase": "second", "heldout_ce": None}
    assert numbers(line, "distill") == {"distill/tokens": 640.0, "distill/loss": 0.5}


@pytest.fixture
def subject(tmp_path):
    return Subject(title="run/round1/distill", label="distill", directory=tmp_path, parameters={"optim": {"lr": 0.1}})


class Recorder:
    """In the place of a service: keeps what it is told, and fails as often as asked to."""

    def __init__(self):
        self.opened, self.lines, self.ended, self.failures = [], [], [], 0

    def open(self, subject):
        self.opened.append(subject.known_id("wandb"))
        subject.keep_id("wandb", subject.known_id("wandb") or "abc")
        return self

    def send(self, lines):
        if self.failures:
            self.failures -= 1
            raise OSError(f"no answer to {KEY}")
        self.lines += lines

    def finish(self, state):
        self.ended.append(state)


@pytest.fixture
def service(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(trackers, "_RUNS", {"wandb": recorder.open})
    monkeypatch.setattr(trackers, "RETRY_S", 0.05)
    return recorder


def log(subject, steps, state="finished"):
    tracked = copy.deepcopy(Trackers(["wandb"], subject))  # as NeMo does with all that a trainer is made of
    for step in steps:
        tracked.log(step, {"distill/loss": 1.0 / step})
    tracked.close(state)


def test_a_training_that_goes_on_goes_on_in_the_same_run(service, subject):
    log(subject, [1, 2, 3], "stopped")
    log(subject, [4, 5])
    log(subject, [])
    assert service.opened == [None, "abc"] and service.ended == ["stopped", "finished"]
    assert service.lines == [(step, {"distill/loss": 1.0 / step}) for step in range(1, 6)]
    assert read_json(subject.directory / "loggers.json") == {"wandb": "abc"}


def test_a_server_that_is_away_for_a_while_loses_nothing(service, subject, capsys):
    service.failures = 2
    tracked = Trackers(["wandb"], subject)
    for step in range(1, 30):
        tracked.log(step, {})
        time.sleep(0.01)
    tracked.close("finished")
    assert [step for step, _ in service.lines] == list(range(1, 30)), "each once, in order"
    assert capsys.readouterr().out.count("training goes on, and it is tried again") == 1


def test_a_server_that_stays_away_is_told_and_ends_nothing(service, subject, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    service.failures = 10**6
    log(subject, [1, 2, 3])
    told = capsys.readouterr().out
    assert "[distill] wandb: OSError: no answer to ***; steps that were not sent: 3\n" in told and KEY not in told
    assert service.ended == []


class FakeWandb(types.ModuleType):
    """The part of `wandb` that is used; keeps its calls."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []
        self.Settings = dict

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_what_weights_and_biases_is_told(subject, monkeypatch):
    """By a stand-in for the package; tests/e2e/test_loggers.py uses the package itself."""
    package = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    log(subject, [1])
    (_, begun), *rest = package.calls
    assert (begun["project"], begun["group"], begun["name"]) == ("nemo_minitron", "run", "run/round1/distill")
    assert begun["id"] == read_json(subject.directory / "loggers.json")["wandb"] and begun["resume"] == "allow"
    assert begun["settings"]["console"] == "off" and begun["settings"]["disable_git"]
    assert ("log", ({"distill/loss": 1.0, "step": 1},), {}) in rest
    assert rest[-1] == ("finish", (), {"exit_code": 0}) and KEY not in str(package.calls)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_mlflow_on_a_store_of_files(subject, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for steps, state, status in (([1, 2], "stopped", "KILLED"), ([3], "finished", "FINISHED")):
        tracked = Trackers(["mlflow"], subject)
        for step in steps:
            tracked.log(step, {"distill/loss": 1.0 / step})
        tracked.close(state)
        client = MlflowClient()
        experiment = client.get_experiment_by_name("nemo_minitron")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.run_id == read_json(subject.directory / "loggers.json")["mlflow"]
        assert run.info.status == status and run.info.run_name == "run/round1/distill"
    assert run.data.params == {"optim.lr": "0.1"} and run.data.tags["group"] == "run"
    history = client.get_metric_history(run.info.run_id, "distill/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1.0 / step) for step in (1, 2, 3)]
