"""Recipes with other losses than forward KL, and with the teacher on disk, through the command."""

import json

import pytest

from tests.e2e.command import manifests, run, run_well

SHORT = {"stages": "[score,prune,cache_teacher,distill,evaluate,report]", "distill__tokens": 1280,
         "train__eval_every_steps": 0}


def heldout(output_dir):
    return json.loads((output_dir / "tiny" / "summary.json").read_text())["rounds"][0]["distilled"]["loss"]


def steps(output_dir):
    lines = (output_dir / "tiny" / "round1" / "distill" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def test_a_cached_teacher_with_all_tokens_trains_like_the_streamed_one(inputs, tmp_path, vocab_size):
    """Written under one layout, read under another."""
    run_well(inputs.arguments(tmp_path / "streamed", **(SHORT | {"stages": "[score,prune,distill,evaluate,report]"})),
             tmp_path)
    cached = {"distill__loss": "top_k_kl", "distill__top_k": vocab_size, "distill__cache_dtype": "float32",
              "distill__cached": True}
    run_well(inputs.arguments(tmp_path / "written", parallel__dp=2, **(SHORT | cached)), tmp_path)
    run_well(inputs.arguments(
        tmp_path / "read", parallel__tp=2, distill__cache=tmp_path / "written" / "tiny" / "round1" / "cache_teacher",
        **(SHORT | cached | {"stages": "[score,prune,distill,evaluate,report]"})), tmp_path)
    assert "cache_teacher" not in manifests(tmp_path / "read" / "tiny")
    for name in ("written", "read"):
        assert heldout(tmp_path / name) == pytest.approx(heldout(tmp_path / "streamed"), rel=1e-5)
        for mine, streamed in zip(steps(tmp_path / name), steps(tmp_path / "streamed"), strict=True):
            assert [mine[key] for key in ("kl", "ce", "teacher_ce", "agreement")] == pytest.approx(
                [streamed[key] for key in ("kl", "ce", "teacher_ce", "agreement")], rel=1e-4, abs=1e-6)


@pytest.fixture
def vocab_size(inputs):
    return json.loads((inputs.teacher / "config.json").read_text())["vocab_size"]


@pytest.mark.parametrize(("changes", "key"), [
    ({"distill__cached": True}, "distill.loss"),
    ({"distill__cached": True, "distill__loss": "top_k_kl", "distill__top_k": 4, "stages": "[score,prune,distill]"},
     "distill.cache"),
])
def test_a_cache_that_cannot_serve_is_one_line(inputs, tmp_path, changes, key):
    finished = run(inputs.arguments(tmp_path / "outputs", **(SHORT | changes)), tmp_path)
    assert finished.code == 2, finished
    (line,) = finished.stderr.splitlines()
    assert key in line
    assert "distill" not in manifests(tmp_path / "outputs" / "tiny")
