"""Training through NeMo's trainer gives the same losses and weights under every layout, and after an interruption."""

import math
from pathlib import Path

import pytest

from tests.support.checkpoints import read_llama
from tests.support.tiny_llama import (
    NEMOTRON,
    QWEN2,
    QWEN3,
    SEQ_LENGTH,
    TIED,
    UNEVEN,
    UNTIED,
    write_documents,
)
from tests.support.trainings import (
    GLOBAL_BATCH,
    INTERRUPT_AT,
    STEPS,
    assert_same_numbers,
    assert_same_weights,
    lines,
    remembered,
    run,
    write_files,
)

STUDENTS = {"tied": TIED, "untied": UNTIED, "uneven": UNEVEN, "qwen2": QWEN2, "qwen3": QWEN3, "nemotron": NEMOTRON}
RELATIONS = {"state": "attention", "teacher_layer": 1, "student_layer": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("layouts"), **STUDENTS)


@pytest.fixture(scope="module")
def trained(files, rank_pool):
    """`trained(layout, name)`: folder and ranks' facts of CE, then distillation; run once."""
    get = remembered(files, rank_pool)
    return lambda layout, name="tied": get(layout, name, ["ce", "kd"])


def test_the_reference_learns(files, trained):
    """At 1x1: the comparisons below are about a training in which something happens."""
    out, _ = trained("1x1")
    before = read_llama(Path(files["tied"]))
    for kind in ("ce", "kd"):
        steps, looks = lines(out, kind)
        assert looks[STEPS] < looks[2] - 0.01
        assert steps[1]["lr"] != steps[2]["lr"] and all(step["grad_norm"] > 0.5 for step in steps.values())
        after = read_llama(out / kind / "checkpoint")
        assert all((after[name] - tensor).abs().max() > 1e-3 for name, tensor in before.items())
    assert "kl" in lines(out, "kd")[0][1]


@pytest.mark.parametrize("kind", ["ce", "kd"])
@pytest.mark.parametrize(("layout", "name"), [
    ("tp2", "tied"), ("pp2", "tied"), ("tp2 sp", "tied"), ("dp2", "tied"), ("tp2 pp2", "tied"), ("tp2 pp2", "untied"),
    ("pp2", "uneven"), ("tp2", "qwen2"), ("tp2", "qwen3"), ("tp2 sp", "qwen3"), ("tp2 sp", "nemotron"),
])
def test_every_layout_trains_alike(trained, layout, name, kind):
    out, _ = trained(layout, name)
    expected, _ = trained("1x1", name)
    assert_same_numbers(out, expected, kind)
    assert_same_weights(out, expected, kind)


@pytest.fixture(scope="module")
def packed(files, rank_pool):
    """`packed(layout, teacher_layout)`: folder of a distillation on packed documents, attention's relations too."""
    documents = files["directory"] / "documents"
    write_documents(documents)
    get = remembered({**files, "tokens": str(documents), "directory": files["directory"] / "packed"}, rank_pool,
                     packed=True, terms=[RELATIONS])
    return lambda layout, teacher_layout=None: get(
        layout, teacher={} if teacher_layout is None else {"layout": teacher_layout})[0]


@pytest.mark.parametrize(("layout", "teacher_layout"), [("tp2 sp", None), ("dp2", None), ("tp2 pp2", None),
                                                        ("dp2", "tp2"), ("tp2", "pp2")])
def test_on_packed_documents_every_layout_trains_alike(packed, layout, teacher_layout):
    """The denominator is the number of valid tokens, which differs from micro-batch to micro-batch."""
    assert_same_numbers(packed(layout, teacher_layout), packed("1x1"), "kd")
    assert_same_weights(packed(layout, teacher_layout), packed("1x1"), "kd")
    tokens = [step["tokens"] for step in lines(packed("1x1"), "kd")[0].values()]
    places = GLOBAL_BATCH * SEQ_LENGTH
    assert all(0.5 * places * step < count < places * step for step, count in enumerate(tokens, 1))


def test_trainings_in_one_worker_do_not_disturb_each_other(files, trained, rank_pool):
    """Distillation alone, and after another training in the same job, gives the same bits."""
    after, _ = trained("1x1")
    alone, _ = run(files, rank_pool, "1x1", "tied", ["kd"], files["directory"] / "alone")
    assert_same_numbers(alone, after, "kd", tolerance=0)
    assert_same_weights(alone, after, "kd", tolerance=0)


@pytest.fixture(scope="module")
def interrupted(files, rank_pool):
    """`interrupted(layout, out)`: a distillation that ended after step 4 of 6, with a resume point after step 3."""

    def get(layout, out, name="tied"):
        _, facts = run(files, rank_pool, layout, name, ["kd"], out, save=True, interrupt=True)
        assert facts[0] == {} and not (out / "kd" / "checkpoint").exists()
        assert list(lines(out, "kd")[0]) == list(range(1, INTERRUPT_AT + 1))
        return out

    return get


@pytest.mark.parametrize("layout", ["1x1", "tp2"])
def test_an_interrupted_training_goes_on_to_the_same_bits(files, trained, interrupted, rank_pool, tmp_path, layout):
    out = interrupted(layout, tmp_path / "out")
    _, facts = run(files, rank_pool, layout, "tied", ["kd"], out, save=True)
    whole, whole_facts = trained(layout)
    assert facts[0]["kd"]["tokens"] == whole_facts[0]["kd"]["tokens"] == STEPS * GLOBAL_BATCH * SEQ_LENGTH
    assert_same_numbers(out, whole, "kd", tolerance=0)
    assert_same_weights(out, whole, "kd", tolerance=0)


@pytest.mark.parametrize(("layout", "other", "name"), [("tp2", "pp2", "tied"), ("pp2", "tp2", "uneven"),
                                                       ("tp2", "dp2", "tied")])
def test_a_resume_point_can_be_read_under_another_layout(files, trained, interrupted, rank_pool, tmp_path, layout,
                                                         other, name):
    """TP 2 pads the vocabulary of 101 to 102 rows, PP 2 does not."""
    out = interrupted(layout, tmp_path / "out", name)
    run(files, rank_pool, other, name, ["kd"], out, save=True)
    whole, _ = trained("1x1", name)
    assert_same_numbers(out, whole, "kd")
    assert_same_weights(out, whole, "kd")


def test_the_teacher_is_no_part_of_the_training(trained):
    """Optimizer, gradient buffers and module hold the student's parameters and no more."""
    _, (facts,) = trained("1x1")
    for kind in ("ce", "kd"):
        held = {name: facts[kind][name] for name in ("optimizer", "buffers", "module")}
        assert held == dict.fromkeys(held, TIED.num_parameters()), kind


def test_the_teacher_is_not_in_the_resume_point(interrupted, tmp_path):
    """Three tensors for each of the student's parameters: itself and Adam's two moments."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    out = interrupted("1x1", tmp_path / "out")
    (point,) = (out / "kd" / "resume").glob("step_*")
    sizes = [math.prod(tensor.global_shape) for tensor in load_tensors_metadata(str(point)).values()]
    assert sum(sizes) == 3 * TIED.num_parameters()
