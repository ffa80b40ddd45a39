"""`fused_linear_loss` over vocabulary shards on gloo processes equals the same call on the whole vocabulary."""

import pytest
import torch
import torch.distributed as dist

from nemo_minitron.distill import fused_kl
from nemo_minitron.distill.losses import LossWeights

WORLD_SIZE = 4
NUM_TOKENS, CHUNK_TOKENS, NUM_CHUNKS = 11, 4, 3
VOCAB, PADDED_VOCAB = 37, 64  # at TP 4 the last shard holds only padding
GRADS = ("student_hidden", "student_head")


def problem(seed, dtype, with_teacher):
    """Arguments on the whole vocabulary; the same on all ranks that give the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    args = {
        "student_hidden": randn(NUM_TOKENS, 6), "student_head": randn(PADDED_VOCAB, 6),
        "teacher_hidden": randn(NUM_TOKENS, 10), "teacher_head": randn(PADDED_VOCAB, 10),
        "labels": torch.randint(VOCAB, (NUM_TOKENS,), generator=generator),
        "loss_mask": (torch.arange(NUM_TOKENS) % 4 != 1).float(),
    }
    args["teacher_hidden"][0] = args["student_hidden"][0] = 0  # all logits tie, across shards too
    args["student_hidden"][1] = args["teacher_hidden"][1] = float("nan")  # masked
    args["labels"][1] = -100
    if not with_teacher:
        args["teacher_hidden"] = args["teacher_head"] = None
    return args


def evaluate(args, group, rank, degree, weights):
    """The sums and the gradients by the hidden states (summed over `group`) and by this rank's rows of the head."""
    num_rows = PADDED_VOCAB // degree
    rows = slice(rank * num_rows, (rank + 1) * num_rows)
    local = {name: value[rows].clone() if name.endswith("head") and value is not None else value
             for name, value in args.items()}
    local.update({name: local[name].clone().requires_grad_() for name in GRADS})
    result = fused_kl.fused_linear_loss(**local, vocab_size=VOCAB, vocab_start=rows.start, group=group,
                                        weights=LossWeights(**weights), chunk_tokens=CHUNK_TOKENS)
    result.loss.backward()
    grad_hidden = local["student_hidden"].grad
    if group is not None:
        dist.all_reduce(grad_hidden, group=group)
    return result, grad_hidden, local["student_head"].grad


def compare(rank, world_size, *, degree, dtype, with_teacher, tolerance, weights):
    """A job: assert that shards give what the whole vocabulary gives; return the collectives it took.

    Below `world_size`, there are data-parallel copies with tokens of their own.
    """
    groups = [dist.new_group(list(range(first, first + degree))) for first in range(0, world_size, degree)]
    group, shard = groups[rank // degree], rank % degree
    args = problem(rank // degree, getattr(torch, dtype), with_teacher)
    expected, expected_hidden, expected_head = evaluate(args, None, 0, 1, weights)
    ops, all_reduce = [], dist.all_reduce

    def counting(tensor, op=dist.ReduceOp.SUM, group=None):
        ops.append(op)
        return all_reduce(tensor, op=op, group=group)

    dist.all_reduce = counting
    try:
        result, grad_hidden, grad_head = evaluate(args, group, shard, degree, weights)
    finally:
        dist.all_reduce = all_reduce
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_hidden, expected_hidden, rtol=tolerance, atol=tolerance)
    expected_head = expected_head.chunk(degree)[shard]
    torch.testing.assert_close(grad_head, expected_head, rtol=tolerance, atol=tolerance)
    dist.destroy_process_group(group)
    return [op.name for op in ops[:-1]]  # the last is the test's own


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("degree", [2, 4])
def test_shards_equal_the_whole_vocabulary(rank_pool, degree, with_teacher, dtype, tolerance):
    collectives = rank_pool(WORLD_SIZE).run(f"{__name__}:compare", degree=degree, dtype=dtype,
                                            with_teacher=with_teacher, tolerance=tolerance,
                                            weights={"kl": 0.5, "ce": 2.0})
    per_micro_batch = ["SUM", "MIN"] if with_teacher else []
    assert collectives == [["MAX", "SUM"] * NUM_CHUNKS + per_micro_batch] * WORLD_SIZE


@pytest.mark.parametrize(("weights", "collectives"), [
    ({"reverse_kl": 1.0}, ["MAX", "SUM"]), ({"js": 1.0, "temperature": 2.0}, ["MAX", "SUM", "SUM"]),
    ({"mse": 1.0, "cosine": 1.0, "ce": 1.0}, ["MAX", "SUM"]),
], ids=str)
@pytest.mark.parametrize("degree", [2, 4])
def test_every_loss_over_shards(rank_pool, degree, weights, collectives):
    counted = rank_pool(WORLD_SIZE).run(f"{__name__}:compare", degree=degree, dtype="float64", with_teacher=True,
                                        tolerance=1e-12, weights={"kl": 0.0} | weights)
    assert counted == [collectives * NUM_CHUNKS + ["SUM", "MIN"]] * WORLD_SIZE
