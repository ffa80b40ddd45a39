"""Signals, numbers that are not finite, a full disk and planted secrets, on the real command."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from tests.e2e.command import NUM_STEPS, run, run_well
from tests.e2e.test_kill import check_went_on, start_and_wait

SECRET = "hf_planted0secret0value"


def test_sigterm_writes_a_resume_point_and_the_same_command_goes_on(halfway, undisturbed, inputs, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    process, _ = start_and_wait(inputs, halfway, 12)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    (told,) = re.findall(r"^minitron: stopped by SIGTERM after step (\d+) of 40 of distill, with a resume point",
                         stderr, re.MULTILINE)
    assert process.returncode == 1 and "Traceback" not in stderr
    run_dir = halfway / "outputs" / "tiny"
    command = [sys.executable, "-m", "nemo_minitron.cli", "status", run_dir, "--json"]
    status = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    (distill,) = [stage for stage in status["stages"] if stage["name"] == "distill"]
    assert (status["state"], distill["state"], distill["resume_step"], distill["steps"]) == (
        "stopped", "stopped", int(told), NUM_STEPS)
    again = run_well(inputs.arguments(halfway / "outputs"), halfway)
    assert f"going on from step {told}" in again.stdout, "nothing is lost"
    check_went_on(again.stdout, halfway, undisturbed, stopped_after=int(told))
    for path in (halfway / "outputs").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
        assert not path.stat().st_mode & 0o002, f"{path} can be changed by anybody"
    assert SECRET not in stdout + stderr + again.stdout + again.stderr


@pytest.mark.parametrize("other", [{"parallel__pp": 2}, {"parallel__dp": 2}])
def test_interrupted_under_tp_2_it_goes_on_under_another_layout(other, halfway, undisturbed, inputs):
    # points every third step also slow the training down, so that the signal comes before its end
    process, _ = start_and_wait(inputs, halfway, 12, parallel__tp=2, train__checkpoint_every_steps=3)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    (told,) = re.findall(r"stopped by SIGTERM after step (\d+) of 40", stderr)
    again = run_well(inputs.arguments(halfway / "outputs", **other), halfway)
    assert f"going on from step {told}" in again.stdout
    found, expected = (step_losses(run_dir) for run_dir in (halfway / "outputs" / "tiny", undisturbed[0]))
    assert list(found) == list(range(1, NUM_STEPS + 1))
    assert found == pytest.approx(expected, abs=1e-5), "nats/token: the same samples in the same order"


def step_losses(run_dir):
    """Training loss of each step of `distill`, nats/token, by step."""
    lines = map(json.loads, (run_dir / "round1/distill/metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_loss_that_is_not_finite_is_named_and_its_batch_kept(halfway, inputs):
    """A learning rate beyond all bounds: the weights of the first step are finite, what they give is not."""
    finished = run(inputs.arguments(halfway / "outputs", optim__lr="1e30", optim__warmup_steps=0), halfway)
    assert finished.code == 1
    found = re.search(r"NotFinite: step (\d+) of distill is not finite: rank 0: (loss of micro-batch|gradient of )",
                      finished.stderr)
    assert found, finished.stderr[-2000:]
    (kept,) = (halfway / "outputs/tiny/round1/distill/not_finite").iterdir()
    assert kept.name == f"step_{int(found[1]):08d}_rank_0.safetensors"
    assert load_file(kept)["tokens"].shape == (4, 32)


def test_steps_that_are_not_finite_are_left_out_but_not_for_ever(halfway, inputs):
    finished = run(inputs.arguments(halfway / "outputs", optim__lr="1e30", optim__warmup_steps=0,
                                    train__not_finite="skip"), halfway)
    assert finished.code == 1 and "the step is left out (10 in a row)" in finished.stdout
    assert "NotFinite" in finished.stderr


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_good_point(halfway, undisturbed, inputs):
    if os.geteuid():
        pytest.skip("a small file system needs root")
    resume = halfway / "outputs/tiny/round1/distill/resume"
    resume.mkdir(parents=True)
    marker = json.loads((undisturbed[0] / "round1/distill/started.json").read_text())
    (resume.parent / "started.json").write_text(json.dumps(marker))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", resume], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        finished = run(inputs.arguments(halfway / "outputs"), halfway)
        points = sorted(path.parent.name for path in resume.glob("step_*/complete.json"))
        used = sum(path.stat().st_size for path in resume.rglob("*") if path.is_file())
    finally:
        subprocess.run(["umount", resume], check=True)
    assert finished.code == 2, (finished.stdout[-500:], finished.stderr[-500:], points, used)
    assert len(finished.stderr.splitlines()) == 1 and "the disk is full" in finished.stderr
    assert points, "the last good one is still there"
    assert f"of step {int(points[-1][5:])} (change output_dir)" in finished.stderr
