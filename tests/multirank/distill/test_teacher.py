"""A teacher in a layout and precision of its own teaches what the one-process run's teacher does."""

import pytest

from tests.multirank.distill.test_intermediate import TERMS
from tests.support.tiny_llama import TIED
from tests.support.trainings import assert_same_numbers, assert_same_weights, lines, remembered, write_files


@pytest.fixture(scope="module")
def trained(tmp_path_factory, rank_pool):
    get = remembered(write_files(tmp_path_factory.mktemp("teacher"), tied=TIED), rank_pool, terms=TERMS)
    return lambda layout, **options: get(layout, **options)[0]


@pytest.mark.parametrize(("student", "teacher"), [
    ("dp2", "tp2"), ("tp2", "dp2"), ("dp2", "pp2"), ("pp2", "dp2"), ("tp2", "pp2"),
    ("pp2", "tp2"), ("tp2 sp", "dp2"), ("dp2", "tp2 sp"), ("tp2 pp2", "tp2 dp2"), ("tp2 pp2", "pp2 dp2"),
])
def test_any_layout_of_the_teacher_teaches_the_same(trained, student, teacher):
    """Logits and intermediate states, against the run with everything in one process."""
    out, expected = trained(student, teacher={"layout": teacher}), trained("1x1")
    assert_same_numbers(out, expected, "kd")
    assert_same_weights(out, expected, "kd")


@pytest.mark.parametrize("options", [{"offload_weights": True}, {"offload_states": True, "offload_weights": True}])
def test_offloading_changes_no_bit(trained, options):
    assert_same_numbers(trained("1x1", teacher=options), trained("1x1"), "kd", tolerance=0)
    assert_same_weights(trained("1x1", teacher=options), trained("1x1"), "kd", tolerance=0)


def test_a_bf16_teacher_under_an_fp32_student(trained):
    """Close to the fp32 teacher, not equal to it, and the same at another layout to bf16's own rounding."""
    steps, _ = lines(trained("1x1", teacher={"precision": "bf16"}), "kd")
    expected, _ = lines(trained("1x1"), "kd")
    differences = [abs(steps[step]["kl"] - expected[step]["kl"]) for step in expected]
    assert 0 < max(differences) < 0.05
    other, _ = lines(trained("dp2", teacher={"precision": "bf16", "layout": "tp2"}), "kd")
    assert max(abs(steps[step]["kl"] - other[step]["kl"]) for step in expected) < 0.05
