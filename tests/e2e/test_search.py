"""A search and rounds on the tiny teacher: killed in between, they go on, and end with the same losses."""

import json
import os
import shutil
import signal
import time

import pytest

from nemo_minitron import submit
from tests.e2e.command import run, run_well, start, summary

SEARCH = {
    "prune__target__hidden_size": None, "prune__target__ffn_hidden_size": None, "search__hidden_size": "[24,16]",
    "search__ffn_hidden_size": "[64,40]", "search__divisors__hidden_size": 8, "search__divisors__ffn_hidden_size": 8,
    "search__tokens": 1024, "search__looks": 4, "search__warmup_steps": 1, "search__compare": True,
    "search__rungs": 2, "distill__tokens": 1280, "optim__warmup_steps": 2, "train__checkpoint_every_steps": 3,
}
ROUNDS = ("rounds=[{name:half,target:{ffn_hidden_size:40},distill:{tokens:640}},"
          "{name:quarter,source:half,target:{hidden_size:24},distill:{tokens:640,lr:0.001}}]")


def losses(run_dir):
    """Every loss of the summary, and those of the candidates."""
    return [(entry["name"], entry["pruned"]["loss"], entry["distilled"]["loss"], entry.get("search"))
            for entry in summary(run_dir)["rounds"]]


def kill_when(arguments, directory, condition):
    """Start the command and kill it, with all that it started, once `condition` holds."""
    process = start(arguments, directory)
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_search_goes_on_where_it_was(inputs, tmp_path):
    arguments = inputs.arguments(tmp_path / "outputs", **SEARCH)
    run_well(arguments, tmp_path)
    run_dir = tmp_path / "outputs" / "tiny"
    expected = losses(run_dir)
    ranking = json.loads((run_dir / "round1/search/ranking.json").read_text())
    assert [len(rung["candidates"]) for rung in ranking["rungs"]] == [4, 2]
    assert [one["step"] for one in ranking["candidates"]] == [8, 8, 4, 4]
    assert len({(run_dir / f"round1/search/{one['name']}/prune/plan.json").read_text()
                for one in ranking["candidates"]}) == 4
    digests = {json.loads((run_dir / f"round1/search/{one['name']}/prune/plan.json").read_text())["scores_digest"]
               for one in ranking["candidates"]}
    assert len(digests) == 1, "pruned from the same scores"
    chosen = ranking["chosen"]["sizes"]
    pruned = json.loads((run_dir / "round1/prune/manifest.json").read_text())["result"]["arch"]
    assert {name: pruned[name] for name in chosen} == chosen
    for stage in ("search", "prune", "distill", "compare", "evaluate", "report"):
        shutil.rmtree(run_dir / "round1" / stage)
    second = ranking["rungs"][0]["candidates"][1]
    third = run_dir / "round1" / "search" / ranking["rungs"][1]["candidates"][0] / "distill" / "manifest.json"
    kill_when(arguments, tmp_path, lambda: (run_dir / "round1/search" / second / "distill/metrics.jsonl").exists())
    kill_when(arguments, tmp_path, third.exists)
    again = run_well(arguments, tmp_path)
    assert "already done: score" in again.stdout
    assert f"search/{second}/prune" not in again.stdout
    assert losses(run_dir) == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rounds_go_on_with_the_first_unfinished_stage(inputs, tmp_path):
    changes = dict.fromkeys(("prune__target__hidden_size", "prune__target__ffn_hidden_size"))
    arguments = [*inputs.arguments(tmp_path / "outputs", **changes, optim__warmup_steps=2), ROUNDS]
    run_well(arguments, tmp_path)
    run_dir = tmp_path / "outputs" / "tiny"
    expected = losses(run_dir)
    assert [entry[0] for entry in expected] == ["half", "quarter"]
    manifest = json.loads((run_dir / "quarter/prune/manifest.json").read_text())["result"]
    assert (manifest["source_arch"]["ffn_hidden_size"], manifest["arch"]["hidden_size"]) == (40, 24)
    teacher = {json.loads((run_dir / f"{name}/distill/manifest.json").read_text())["result"]["teacher_digest"]
               for name in ("half", "quarter")}
    assert len(teacher) == 1, "the original teacher in both rounds"
    assert "Traceback" not in (page := (run_dir / "report.html").read_text()) and "quarter" in page
    for stage in ("distill", "evaluate", "report"):
        shutil.rmtree(run_dir / "quarter" / stage)
    again = run_well(arguments, tmp_path)
    assert "already done in half: score, prune, distill, evaluate, report" in again.stdout
    assert "already done in quarter: score, prune\n" in again.stdout
    assert losses(run_dir) == expected


def only_search(inputs, directory, **changes):
    """The search alone, as the arguments of a command with results in `directory`."""
    return inputs.arguments(directory, **SEARCH, stages="[score,prune]", **changes)


def candidates(run_dir):
    """Every candidate's losses as they were measured, and who went on from which rung."""
    ranking = json.loads((run_dir / "round1/search/ranking.json").read_text())
    return ([(one["name"], one["pruned_loss"], one["curve"]) for one in ranking["candidates"]], ranking["rungs"],
            ranking["chosen"]["name"])


@pytest.fixture(scope="module")
def one_after_another(inputs, tmp_path_factory):
    """What the search comes to in one process."""
    directory = tmp_path_factory.mktemp("search")
    run_well(only_search(inputs, directory / "outputs"), directory)
    return candidates(directory / "outputs/tiny")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_candidates_side_by_side_have_the_same_losses_and_go_on_after_a_kill(inputs, one_after_another, tmp_path):
    arguments = only_search(inputs, tmp_path / "outputs", parallel__dp=2, parallel__search_groups=2)
    run_dir = tmp_path / "outputs/tiny"
    search = run_dir / "round1/search"
    kill_when(arguments, tmp_path, lambda: len(list(search.glob("*/distill/started.json"))) >= 2)
    assert not list(search.glob("*/distill/resume/*/complete.json")), "two candidates were trained at the same time"
    begun = sorted(path.parents[1].name for path in search.glob("*/distill/started.json"))
    kill_when(arguments, tmp_path, lambda: len(list(search.glob("*/distill/manifest.json"))) >= 1)
    again = run_well(arguments, tmp_path)
    assert "already done: score" in again.stdout and f"search/{begun[0]}/prune" not in again.stdout
    assert candidates(run_dir) == one_after_another
    manifests = [json.loads(path.read_text()) for path in search.glob("*/distill/manifest.json")]
    assert len(manifests) == 2 and all(found["world"]["world_size"] == 1 for found in manifests)
    assert "already done: score, search, prune" in run_well(arguments, tmp_path).stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tasks_of_job_arrays_have_the_same_losses(inputs, one_after_another, tmp_path, monkeypatch):
    arguments = only_search(inputs, tmp_path / "outputs", cluster__search_array=2)
    before, *arrays, after = submit.chain(arguments)
    assert [job.array for job in arrays] == [4, 2]
    run_well([*before.arguments], tmp_path)
    search = tmp_path / "outputs/tiny/round1/search"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    early = run([*arrays[1].arguments], tmp_path)
    assert early.code == 2 and "the rung before is not finished" in early.stderr
    for array in arrays:
        for task in range(0, array.array, 2):  # two at the same time
            both = []
            for number in (task, task + 1):
                monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
                both.append(start([*array.arguments], tmp_path))
            for process in both:
                said = process.communicate()
                assert process.returncode == 0, said
        assert len(list(search.glob("*/prune/manifest.json"))) == 4
    again = run_well([*arrays[1].arguments], tmp_path)
    assert "already done" in again.stdout and "== " not in again.stdout
    beyond = run([*arrays[0].arguments, "task=4"], tmp_path)
    assert beyond.code == 2 and "0 to 3" in beyond.stderr
    assert not (search / "ranking.json").exists(), "the ranking is for the job that comes after"
    ranked = run_well([*after.arguments], tmp_path)
    assert "search/" not in ranked.stdout, "it trains nothing"
    assert candidates(tmp_path / "outputs/tiny") == one_after_another
