"""A student from elsewhere, and a teacher that is corrected meanwhile, through the command."""

import json
import shutil

import pytest

from nemo_minitron.data.tokenizer import train_bpe
from tests.e2e.command import manifests, run, run_well, summary
from tests.e2e.conftest import write_text

SHORT = {"distill__tokens": 1280, "train__eval_every_steps": 0, "prune__target__hidden_size": None,
         "prune__target__ffn_hidden_size": None}


def test_a_student_from_elsewhere_learns_with_states_of_its_teacher(inputs, undisturbed, tmp_path):
    """The pruned model of another run is taken as it is; the resolved terms are in the metrics; no scoring."""
    pruned = undisturbed[0] / "round1" / "prune" / "checkpoint"
    finished = run_well(inputs.arguments(
        tmp_path / "outputs", prune__student=pruned, distill="depth", parallel__pp=2,
        distill__teacher__pp=1, **SHORT), tmp_path)
    run_dir = tmp_path / "outputs" / "tiny"
    assert set(manifests(run_dir)) == {"prune", "distill", "evaluate", "report"} and "is the student" in finished.stdout
    found, expected = summary(run_dir)["rounds"][0], summary(undisturbed[0])["rounds"][0]
    assert found["pruned"]["loss"] == pytest.approx(expected["pruned"]["loss"], rel=1e-6)
    assert found["distilled"]["loss"] < found["pruned"]["loss"]
    lines = [json.loads(line) for line in (run_dir / "round1/distill/metrics.jsonl").read_text().splitlines()]
    assert all({"hidden_1_1", "embedding", "alpha", "intermediate", "logits_loss"} <= line.keys() for line in lines)
    assert (run_dir / "report.html").exists()


def test_a_larger_student_is_allowed_with_a_warning(inputs, undisturbed, tmp_path):
    pruned = undisturbed[0] / "round1" / "prune" / "checkpoint"
    finished = run_well(inputs.arguments(tmp_path / "outputs", teacher__path=pruned, prune__student=inputs.teacher,
                                         stages="[prune]", **SHORT), tmp_path)
    assert "warning: the student is larger than its teacher" in finished.stdout


def test_another_tokenizer_is_refused_by_its_first_token(inputs, undisturbed, tmp_path):
    pruned = tmp_path / "pruned"
    shutil.copytree(undisturbed[0] / "round1" / "prune" / "checkpoint", pruned)
    documents = [document.replace("the", "zig") for document in write_text(tmp_path / "other")]
    train_bpe(documents, pruned, vocab_size=300)
    finished = run(inputs.arguments(tmp_path / "outputs", prune__student=pruned, stages="[prune]", **SHORT), tmp_path)
    (line,) = finished.stderr.splitlines()
    assert finished.code == 2 and "the tokenizers differ" in line and "prune.student" in line and "token 2" in line
    assert not manifests(tmp_path / "outputs" / "tiny")
    assert not list((tmp_path / "outputs").rglob("*.safetensors"))


def test_a_teacher_that_is_corrected_meanwhile(inputs, undisturbed, tmp_path):
    """The newest snapshot teaches; what was taken is on record, and a snapshot of another shape is refused."""
    run_well(inputs.arguments(tmp_path / "teacher", stages="[correct]", correct__tokens=1280,
                              correct__snapshot_every_steps=4, train__eval_every_steps=0), tmp_path)
    snapshots = tmp_path / "teacher" / "tiny" / "round1" / "correct" / "snapshots"
    assert sorted(path.name for path in snapshots.iterdir()) == ["step_00000004", "step_00000008", "step_00000010"]
    pruned = undisturbed[0] / "round1" / "prune" / "checkpoint"
    arguments = {"prune__student": pruned, "distill__teacher__exchange_every_steps": 4, **SHORT,
                 "stages": "[prune,distill]", "distill__teacher__snapshots": snapshots}
    finished = run_well(inputs.arguments(tmp_path / "outputs", **arguments), tmp_path)
    assert "step 0: teacher is now" in finished.stdout and "step_00000010" in finished.stdout
    record = tmp_path / "outputs" / "tiny" / "round1" / "distill" / "teachers.jsonl"
    assert [json.loads(line) for line in record.read_text().splitlines()] == [
        {"step": step, "snapshot": "step_00000010"} for step in (0, 4, 8)]
    shutil.copytree(pruned, snapshots / "step_00000011")
    refused = run(inputs.arguments(tmp_path / "refused", **arguments), tmp_path)
    (line,) = refused.stderr.splitlines()
    assert refused.code == 2 and "another architecture" in line and "distill.teacher.snapshots" in line
