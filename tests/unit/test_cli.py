import subprocess
import sys

import pytest
import yaml

from nemo_minitron import pipeline
from nemo_minitron.cli import main
from nemo_minitron.compose import config_from_dict, load_config
from nemo_minitron.errors import CheckpointError
from nemo_minitron.launch.workers import WorkerError


@pytest.fixture
def runs(monkeypatch):
    """What `pipeline.run` is called with, instead of running it."""
    calls = []
    monkeypatch.setattr(pipeline, "run", lambda config, arguments: calls.append((config, arguments)))
    return calls


@pytest.mark.parametrize("arguments", [["experiment=demo", "seed=3"], ["run", "experiment=demo", "seed=3"]])
def test_run_is_the_default(arguments, runs):
    assert main(arguments) == 0
    assert runs == [(load_config(["experiment=demo", "seed=3"]), arguments)]


def test_config_prints_the_recipe_and_starts_nothing(runs, capsys):
    assert main(["config", "experiment=demo"]) == 0
    assert config_from_dict(yaml.safe_load(capsys.readouterr().out)) == load_config(["experiment=demo"])
    assert runs == []


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run", "experiment=demo", "--help"]])
def test_help(arguments, runs, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: minitron") and runs == []


def test_an_unknown_command(runs, capsys):
    assert main(["prune", "experiment=demo"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("minitron: unknown command") and "'prune'" in captured.err
    assert runs == []


@pytest.mark.parametrize(("error", "code", "first", "num_lines"), [
    (CheckpointError("no weights", expected="some", found="none", key="teacher.path"), 2,
     "minitron: no weights; expected some; found none (change teacher.path)", 1),
    (WorkerError("rank 3 failed:\nits traceback"), 1, "rank 3 failed:", 2),
    (KeyboardInterrupt(), 1, "minitron: interrupted; the same command goes on from here", 1),
])
def test_errors_become_exit_codes(error, code, first, num_lines, monkeypatch, capsys):
    def fail(config, arguments):
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    assert main(["experiment=demo"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == first and len(lines) == num_lines


def test_a_defect_shows_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "run", lambda config, arguments: [][1])
    assert main(["experiment=demo"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "IndexError" in shown


def test_the_command_itself_imports_nothing_big():
    code = ("import sys, nemo_minitron.cli, nemo_minitron.pipeline\n"
            "print({'torch', 'megatron', 'nemo', 'lightning', 'transformers'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
