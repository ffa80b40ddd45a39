"""The step-time model: its limits, and how parts move with what they depend on."""

import dataclasses

import pytest

from nemo_minitron.arch import ArchSpec
from nemo_minitron.cost.flops import training_flops
from nemo_minitron.cost.hardware import A100_SXM, BANDWIDTH_EFFICIENCY, COLLECTIVE_LATENCY_S, GPUS, H100_SXM, gpu_named
from nemo_minitron.cost.memory import Step
from nemo_minitron.cost.step_time import PARTS, Machine, step_seconds
from nemo_minitron.errors import ConfigError
from nemo_minitron.parallel.layout import Layout

LLAMA = ArchSpec(family="llama", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32,
                 num_query_groups=8, head_dim=128, vocab_size=128256)
STUDENT = dataclasses.replace(LLAMA, hidden_size=3072, ffn_hidden_size=9216)
STEP = Step(seq_length=4096, global_batch_size=128, micro_batch_size=2, bf16=True, distributed_optimizer=True,
            chunk_tokens=1024)


def seconds(*, tp=1, pp=1, dp=1, step=STEP, gpu=H100_SXM, student=STUDENT, teacher=LLAMA):
    layout = Layout(tp=tp, pp=pp, dp=dp, sequence_parallel=tp > 1)
    return step_seconds(student, layout, step, gpu, teacher=teacher)


def test_a_large_product_is_bound_by_arithmetic_and_a_thin_one_by_memory():
    machine = Machine(gpu=H100_SXM, layout=Layout(), bf16=True)
    assert machine.matmul(8192, 8192, 8192) == pytest.approx(2 * 8192**3 / (H100_SXM.bf16_flops * 0.801))
    moved = 2 * (8192 + 8192**2 + 8192)
    assert machine.matmul(1, 8192, 8192) == pytest.approx(moved / (H100_SXM.memory_bandwidth * BANDWIDTH_EFFICIENCY))


def test_a_ring_moves_its_bytes_twice_over_the_slowest_link():
    machine = Machine(gpu=H100_SXM, layout=Layout(tp=8, dp=4), bf16=True)
    assert machine.all_reduce(1e9, 1) == 0
    inside = machine.all_reduce(1e9, 8)
    assert inside == pytest.approx(2 * 7 / 8 * 1e9 / (450e9 * BANDWIDTH_EFFICIENCY) + COLLECTIVE_LATENCY_S["link"])
    outside = machine.all_reduce(1e9, 4, stride=8)
    expected = 2 * 3 / 4 * 1e9 / (50e9 * BANDWIDTH_EFFICIENCY) + COLLECTIVE_LATENCY_S["network"]
    assert outside == pytest.approx(expected)
    assert machine.all_reduce(1e9, 16) < outside, "all eight of a node's cards"


def test_no_step_is_faster_than_its_arithmetic():
    for gpu in GPUS.values():
        flops = training_flops(STUDENT, samples=128, seq_length=4096, teacher=LLAMA)
        flops -= 0.5 * (flops - training_flops(STUDENT, samples=128, seq_length=1, teacher=LLAMA) * 4096)  # causal
        for degrees in ({}, {"tp": 8}, {"pp": 4}, {"tp": 2, "pp": 2, "dp": 2}):
            gpus = Layout(**degrees).world_size
            assert seconds(gpu=gpu, **degrees).total > flops / (gpus * gpu.bf16_flops)


def test_the_teacher_costs_its_forward():
    with_teacher, without = seconds(), seconds(teacher=None)
    assert without.teacher == 0 < with_teacher.teacher
    same = seconds(student=LLAMA, teacher=LLAMA)
    compute = same.matmul + same.attention + same.elementwise
    assert 0.25 < same.teacher / compute < 0.34, "a third of forward and backward, less where attention recomputes"


@pytest.mark.parametrize(("part", "degrees"), [
    ("tensor_parallel", {"tp": 8}), ("pipeline", {"pp": 4}), ("data_parallel", {"dp": 8}),
])
def test_each_degree_has_its_price(part, degrees):
    assert getattr(seconds(**degrees), part) > 0 == getattr(seconds(), part)


def test_bubbles_shrink_with_micro_batches():
    few, many = (seconds(pp=4, step=dataclasses.replace(STEP, global_batch_size=batch)) for batch in (16, 256))
    assert few.pipeline / few.total > 2 * many.pipeline / many.total


def test_the_bubble_of_equal_stages_is_what_the_formula_says():
    """(pp - 1) / m of the time of m micro-batches (arXiv:2104.04473, section 2.2.1); sends are left out."""
    found = seconds(pp=4, teacher=None, student=dataclasses.replace(LLAMA, vocab_size=8))
    busy = found.matmul + found.attention + found.elementwise + found.loss
    assert found.pipeline / busy == pytest.approx(3 / 64, rel=0.15)


def test_twice_the_gpus_do_not_do_twice_the_work():
    one, two = seconds(tp=8, dp=8).total, seconds(tp=8, dp=16).total
    assert one / 2 < two < one


def test_an_older_gpu_is_slower():
    assert 2 < seconds(gpu=A100_SXM).total / seconds().total < H100_SXM.bf16_flops / A100_SXM.bf16_flops


def test_parts_add_up():
    found = seconds(tp=2, pp=2, dp=2)
    assert found.total == pytest.approx(sum(getattr(found, part) for part in PARTS))
    assert found.times(2).plus(found).total == pytest.approx(3 * found.total)


def test_an_unknown_gpu():
    with pytest.raises(ConfigError, match=r"h100_sxm.*'tpu'.*plan\.gpu"):
        gpu_named("tpu")
