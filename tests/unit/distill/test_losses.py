"""The plain formulas against loops and closed forms."""

import math

import torch

from nemo_minitron.distill.losses import cross_entropy, forward_kl

NAN = float("nan")


def test_forward_kl_of_two_coins():
    teacher = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64).log()
    student = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    expected = [0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(5 / 9) + 0.5 * math.log(5)]
    torch.testing.assert_close(forward_kl(student, teacher, torch.ones(2)).item(), sum(expected))
    torch.testing.assert_close(forward_kl(student, teacher, torch.tensor([0, 1])).item(), expected[1])


def test_cross_entropy_is_minus_log_probability_of_the_label():
    logits = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]], dtype=torch.float64).log() + 5
    labels = torch.tensor([2, 1])
    expected = -math.log(0.5) - math.log(0.2)
    torch.testing.assert_close(cross_entropy(logits, labels, torch.ones(2)).item(), expected)


def test_rows_that_do_not_count_contribute_nothing():
    logits = torch.tensor([[0.0, 1.0], [NAN, 1.0]], requires_grad=True)
    mask, labels = torch.tensor([1, 0]), torch.tensor([0, -100])
    (forward_kl(logits, torch.zeros(2, 2), mask) + cross_entropy(logits, labels, mask)).backward()
    assert logits.grad[0].abs().min() > 0
    assert (logits.grad[1] == 0).all()
    nothing = torch.zeros(2)
    assert forward_kl(logits, logits, nothing) == 0
    assert cross_entropy(logits, labels, nothing) == 0


def test_bfloat16_logits_are_reduced_in_float32_and_the_teacher_gets_no_gradient():
    student = torch.randn(3, 5).bfloat16().requires_grad_()
    teacher = torch.randn(3, 5).bfloat16().requires_grad_()
    loss = forward_kl(student, teacher, torch.ones(3))
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert teacher.grad is None
