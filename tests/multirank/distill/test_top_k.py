"""Top-k distillation over vocabulary shards on gloo processes equals the same on the whole vocabulary."""

import pytest
import torch
import torch.distributed as dist

from nemo_minitron.distill.losses import LossWeights
from nemo_minitron.distill.top_k import fused_top_k_loss, teacher_top_k
from tests.multirank.distill.test_fused_kl import PADDED_VOCAB, VOCAB, problem

WORLD_SIZE = 4


def evaluate(args, group, rank, degree, k):
    num_rows = PADDED_VOCAB // degree
    rows = slice(rank * num_rows, (rank + 1) * num_rows)
    common = {"labels": args["labels"], "vocab_size": VOCAB, "vocab_start": rows.start, "group": group,
              "chunk_tokens": 4, "loss_mask": args["loss_mask"]}
    target = teacher_top_k(args["teacher_hidden"], args["teacher_head"][rows], k=k, **common)
    hidden = args["student_hidden"].clone().requires_grad_()
    head = args["student_head"][rows].clone().requires_grad_()
    result = fused_top_k_loss(hidden, head, target=target,
                              weights=LossWeights(kl=0.5, ce=2.0), **common)
    result.loss.backward()
    if group is not None:
        dist.all_reduce(hidden.grad, group=group)
    return result, target, hidden.grad, head.grad


def compare(rank, world_size, *, degree, k):
    groups = [dist.new_group(list(range(first, first + degree))) for first in range(0, world_size, degree)]
    group, shard = groups[rank // degree], rank % degree
    args = problem(rank // degree, torch.float64, True)
    expected, whole, expected_hidden, expected_head = evaluate(args, None, 0, 1, k)
    result, target, grad_hidden, grad_head = evaluate(args, group, shard, degree, k)
    counted = args["loss_mask"] != 0
    assert torch.equal(target.ids[counted], whole.ids[counted])
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_hidden, expected_hidden, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad_head, expected_head.chunk(degree)[shard], rtol=1e-11, atol=1e-12)
    dist.destroy_process_group(group)
    return True


@pytest.mark.parametrize("k", [1, 5, VOCAB])
@pytest.mark.parametrize("degree", [2, 4])
def test_shards_equal_the_whole_vocabulary(rank_pool, degree, k):
    assert rank_pool(WORLD_SIZE).run(f"{__name__}:compare", degree=degree, k=k) == [True] * WORLD_SIZE
