"""Bytes by kind, and how they move with the layout; a multirank test compares them with a real run."""

import dataclasses

import pytest

from nemo_minitron.cost.memory import KINDS, Step, forward_memory, training_memory
from nemo_minitron.cost.shards import buffer_elements, stage_tensors
from nemo_minitron.parallel.layout import Layout
from tests.support.tiny_llama import NEMOTRON, QWEN2, QWEN3, TIED, UNTIED

ARCHS = {"untied": UNTIED, "nemotron": NEMOTRON, "qwen2": QWEN2, "qwen3": QWEN3, "tied": TIED}
STEP = Step(seq_length=16, global_batch_size=8, micro_batch_size=2, bf16=True)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_one_rank_holds_every_parameter(arch):
    assert sum(stage_tensors(arch, Layout(), 0)) == arch.num_parameters()


@pytest.mark.parametrize("arch", [UNTIED, NEMOTRON, QWEN3])
def test_stages_hold_every_parameter_once(arch):
    layout = Layout(pp=2)
    assert sum(sum(stage_tensors(arch, layout, stage)) for stage in range(2)) == arch.num_parameters()


def test_a_tied_head_is_copied_to_the_last_stage():
    layout = Layout(pp=2)
    held = sum(sum(stage_tensors(TIED, layout, stage)) for stage in range(2))
    assert held == TIED.num_parameters() + TIED.vocab_size * TIED.hidden_size


def test_tensor_parallel_ranks_share_matrices_and_copy_norms():
    """101 tokens are padded to 102 rows."""
    held = sum(stage_tensors(UNTIED, Layout(tp=2), 0))
    norms = (2 * UNTIED.num_layers + 1) * UNTIED.hidden_size
    assert 2 * held == UNTIED.num_parameters() + norms + 2 * UNTIED.hidden_size


def test_buffers_of_the_distributed_optimizer_are_padded():
    assert buffer_elements([3, 5], dp=2, distributed_optimizer=False) == 8
    assert buffer_elements([3, 5], dp=2, distributed_optimizer=True) == 128  # 5, then at 64 the 3, then to 128
    assert buffer_elements([200], dp=3, distributed_optimizer=True) == 384


def test_bytes_of_a_parameter():
    number = UNTIED.num_parameters()
    mixed = training_memory(UNTIED, Layout(), STEP, teacher=TIED)
    assert (mixed.weights, mixed.gradients, mixed.optimizer) == (2 * number, 4 * number, 12 * number)
    assert mixed.teacher == 2 * TIED.num_parameters()
    plain = training_memory(UNTIED, Layout(), dataclasses.replace(STEP, bf16=False))
    assert (plain.weights, plain.gradients, plain.optimizer, plain.teacher) == (4 * number, 4 * number, 8 * number, 0)
    assert mixed.total == sum(getattr(mixed, kind) for kind in KINDS)


def test_the_distributed_optimizer_shards_states_alone():
    sharded = training_memory(UNTIED, Layout(dp=4), dataclasses.replace(STEP, distributed_optimizer=True))
    whole = training_memory(UNTIED, Layout(dp=4), STEP)
    assert sharded.optimizer == pytest.approx(whole.optimizer / 4, rel=0.05)
    assert sharded.gradients == pytest.approx(whole.gradients, rel=0.05)


def test_a_pipelined_teacher_keeps_the_states_of_all_micro_batches():
    """On the last stage alone: 4 micro-batches of 2 * 4096 tokens, bf16."""
    teacher = dataclasses.replace(UNTIED, hidden_size=2048)
    last = training_memory(UNTIED, Layout(pp=2), dataclasses.replace(STEP, seq_length=4096), teacher=teacher)
    assert last.stage == 1
    assert last.teacher == 2 * sum(stage_tensors(teacher, Layout(pp=2), 1)) + 4 * 2 * 4096 * 2048 * 2


def test_activations_shrink_with_tensor_parallelism_and_grow_with_stages_in_flight():
    large = dataclasses.replace(UNTIED, hidden_size=1024, ffn_hidden_size=4096, num_layers=8)
    step = dataclasses.replace(STEP, seq_length=1024)
    plain, tp, sp = (training_memory(large, layout, step).activations
                     for layout in (Layout(), Layout(tp=2), Layout(tp=2, sequence_parallel=True)))
    assert plain > tp > sp > plain / 2
    staged = training_memory(large, Layout(pp=2), step)
    assert staged.activations == pytest.approx(plain, rel=0.2), "half the layers, two micro-batches"


def test_a_chunk_bounds_the_memory_of_the_loss():
    step = dataclasses.replace(STEP, seq_length=1024)
    one, two = (training_memory(UNTIED, Layout(), dataclasses.replace(step, chunk_tokens=chunk), teacher=TIED).loss
                for chunk in (256, 512))
    logits = 2.75 * 256 * UNTIED.vocab_size * 4
    assert two - one == pytest.approx(logits)


def test_forward_only_holds_weights_and_a_working_set():
    memory = forward_memory(UNTIED, Layout(), tokens=32, itemsize=4)
    assert memory.weights == 4 * UNTIED.num_parameters()
    assert memory.gradients == memory.optimizer == memory.loss == 0 < memory.activations
