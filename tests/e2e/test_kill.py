"""A run that is killed goes on from its last resume point, and ends with the same bits."""

import json
import os
import re
import signal
import time

from tests.e2e.command import CHECKPOINT_EVERY, NUM_STEPS, run_well, start


def steps_done(run_dir):
    """The last step in the metrics of `distill`, 0 before there is one."""
    path = run_dir / "round1" / "distill" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def descendants(pid):
    """Process ids of `pid` and of all that it started, by /proc."""
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def is_running(pid):
    """Whether the process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds):
    """Whether `condition` came true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def start_and_wait(inputs, directory, step, modules=None, **changes):
    """Start the tiny recipe and wait until `distill` has passed `step`; returns the process and its tree.

    From the first step that is saved on there is also a resume point, complete, to go on from.
    """
    saved = step >= CHECKPOINT_EVERY
    process = start(inputs.arguments(directory / "outputs", **changes), directory, modules=modules)
    run_dir = directory / "outputs/tiny"
    deadline = time.monotonic() + 300
    try:
        while steps_done(run_dir) <= step or (
                saved and not list(run_dir.glob("round1/distill/resume/*/complete.json"))):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    except AssertionError:
        process.kill()  # its ranks end with it
        raise
    tree = descendants(process.pid)
    assert len(tree) >= 3, "the command, torchrun and a rank"
    return process, tree


def check_went_on(stdout, directory, undisturbed, stopped_after=None):
    """`stdout` is that of the command that went on: the files are those of the undisturbed run, bit by bit.

    It went on from a step that is saved anyway; where ranks were stopped in order, after `stopped_after` or more, from
    the step that was their last.
    """
    run_dir = directory / "outputs" / "tiny"
    (first_step,) = re.findall(r"^\[distill\] going on from step (\d+)$", stdout, re.MULTILINE)
    if stopped_after is None:
        assert int(first_step) >= CHECKPOINT_EVERY and int(first_step) % CHECKPOINT_EVERY == 0
    else:
        assert int(first_step) >= stopped_after >= CHECKPOINT_EVERY
    name = "round1/distill/checkpoint/model.safetensors"
    assert (run_dir / name).read_bytes() == (undisturbed[0] / name).read_bytes()
    lines = [json.loads(line) for line in (run_dir / "round1/distill/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, NUM_STEPS + 1))
    result = json.loads((run_dir / "round1/distill/manifest.json").read_text())["result"]
    assert (result["steps"], result["tokens"]) == (NUM_STEPS, lines[-1]["tokens"])


def test_killed_with_its_process_group(halfway, undisturbed, inputs):
    process, tree = start_and_wait(inputs, halfway, CHECKPOINT_EVERY)
    os.killpg(process.pid, signal.SIGKILL)  # torchrun puts its ranks into sessions of their own
    process.wait()
    assert wait_until(lambda: not any(is_running(pid) for pid in tree), 2.0), "a rank went on without its parents"
    process.communicate()
    assert not (halfway / "outputs" / "tiny" / "round1" / "distill" / "manifest.json").exists()
    again = run_well(inputs.arguments(halfway / "outputs"), halfway)
    check_went_on(again.stdout, halfway, undisturbed)


def test_killed_alone_its_ranks_end_before_the_next_run_begins(halfway, undisturbed, inputs):
    process, tree = start_and_wait(inputs, halfway, CHECKPOINT_EVERY)
    os.kill(process.pid, signal.SIGKILL)
    done = steps_done(halfway / "outputs" / "tiny")
    again = start(inputs.arguments(halfway / "outputs"), halfway)
    assert again.stdout is not None
    first_line = again.stdout.readline()  # printed once it holds the lock
    left = [pid for pid in tree[1:] if is_running(pid)]
    process.communicate()
    stdout, stderr = again.communicate(timeout=120)
    assert first_line == "already done: score, prune\n" and not left
    assert again.returncode == 0, stderr
    # torchrun is told by SIGTERM that its parent is gone, and its ranks end with a resume point: no step is lost
    check_went_on(stdout, halfway, undisturbed, stopped_after=done)
