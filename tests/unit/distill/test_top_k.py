"""`teacher_top_k` and `fused_top_k_loss` on one process, against `losses.top_k_kl` and autograd."""

import pytest
import torch

from nemo_minitron.distill.fused_kl import fused_linear_loss
from nemo_minitron.distill.losses import LossWeights, cross_entropy, top_k_kl
from nemo_minitron.distill.top_k import fused_top_k_loss, teacher_top_k

NUM_TOKENS, VOCAB, PADDED_VOCAB = 23, 37, 48


def problem(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    args = {"student_hidden": randn(NUM_TOKENS, 6).requires_grad_(), "student_head": randn(PADDED_VOCAB, 6),
            "teacher_hidden": randn(NUM_TOKENS, 10), "teacher_head": randn(PADDED_VOCAB, 10),
            "labels": torch.randint(VOCAB, (NUM_TOKENS,), generator=generator),
            "loss_mask": (torch.arange(NUM_TOKENS) % 4 != 1).float()}
    args["student_head"][VOCAB:] = args["teacher_head"][VOCAB:] = 1000
    args["student_head"].requires_grad_()
    return args


def shard(args):
    return {"labels": args["labels"], "vocab_size": VOCAB, "vocab_start": 0, "group": None, "chunk_tokens": 5,
            "loss_mask": args["loss_mask"]}


def fused(args, k, **weights):
    target = teacher_top_k(args["teacher_hidden"], args["teacher_head"], k=k, **shard(args))
    return fused_top_k_loss(args["student_hidden"], args["student_head"], target=target,
                            weights=LossWeights(**weights), **shard(args))


def logits(args, side):
    return args[f"{side}_hidden"].double() @ args[f"{side}_head"][:VOCAB].double().t()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("k", [1, 4, 36, 37])
def test_value_and_gradients_equal_the_plain_formula(k, dtype, rtol):
    args = problem(dtype)
    result = fused(args, k, kl=0.7, ce=0.3)
    result.loss.backward()
    kl = top_k_kl(logits(args, "student"), logits(args, "teacher"), args["loss_mask"], k)
    ce = cross_entropy(logits(args, "student"), args["labels"], args["loss_mask"])
    expected = torch.autograd.grad(0.7 * kl + 0.3 * ce, [args["student_hidden"], args["student_head"]])
    torch.testing.assert_close(result.kl.double(), kl, rtol=rtol, atol=0)
    torch.testing.assert_close(result.ce.double(), ce, rtol=rtol, atol=0)
    teacher_ce = cross_entropy(logits(args, "teacher"), args["labels"], args["loss_mask"])
    torch.testing.assert_close(result.teacher_ce.double(), teacher_ce, rtol=rtol, atol=0)
    for name, grad in zip(("student_hidden", "student_head"), expected, strict=True):
        torch.testing.assert_close(args[name].grad.double(), grad.double(), rtol=0,
                                   atol=4 * rtol * grad.abs().max().item())


def test_all_tokens_give_what_the_online_loss_gives():
    online, stored = problem(), problem()
    expected = fused_linear_loss(online["student_hidden"], online["student_head"],
                                 teacher_hidden=online["teacher_hidden"], teacher_head=online["teacher_head"],
                                 weights=LossWeights(ce=0.5), **shard(online))
    result = fused(stored, VOCAB, ce=0.5)
    for loss in (expected.loss, result.loss):
        loss.backward()
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stored["student_head"].grad, online["student_head"].grad, rtol=1e-11, atol=1e-12)


def test_of_equal_logits_the_lower_ids_are_taken():
    args = problem()
    args["teacher_head"].zero_()
    target = teacher_top_k(args["teacher_hidden"], args["teacher_head"], k=3, **shard(args))
    assert (target.ids == torch.arange(3)).all()
    torch.testing.assert_close(target.log_tail.exp(), torch.full((NUM_TOKENS,), 34 / 37, dtype=torch.float64))


def test_fewer_buckets_never_raise_the_divergence():
    kls = [fused(problem(), k).kl.item() for k in (1, 2, 8, 20, VOCAB)]
    assert kls == sorted(kls) and kls[0] < kls[-1]


def test_rows_that_do_not_count_may_hold_anything():
    args = problem()
    ignored = args["loss_mask"] == 0
    with torch.no_grad():
        args["student_hidden"][ignored] = args["teacher_hidden"][ignored] = float("nan")
        args["labels"][ignored] = -100
    result = fused(args, 4, ce=1.0)
    result.loss.backward()
    assert all(value.isfinite() for value in result)
    assert (args["student_hidden"].grad[ignored] == 0).all() and args["student_head"].grad.isfinite().all()
