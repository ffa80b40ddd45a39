"""The alternative's own arithmetic: its schedule is NeMo's, its loss the definition, its decay Megatron's."""

import pytest
import torch

from benchmarks.plain_kd import distillation_sums, learning_rate, parameter_groups
from nemo_minitron.distill.losses import cross_entropy, forward_kl


def test_learning_rate_is_what_nemo_applied() -> None:
    # `lr` in the metrics.jsonl of a run of 13 steps with 3 steps of warm-up (nemo_toolkit 2.7.3)
    logged = {0: 0.0005, 3: 0.002, 4: 0.0019515459425747395, 8: 0.00101, 12: 6.845405005151406e-05}
    for step, expected in logged.items():
        rate = learning_rate(step, lr=2e-3, min_lr=2e-5, warmup_steps=3, num_steps=13)
        assert rate == pytest.approx(expected, rel=1e-6)


def test_sums_are_the_definitions() -> None:
    student, teacher = torch.randn(2, 3, 4, 7, dtype=torch.float32)
    labels = torch.randint(7, (3, 4))
    kl, ce = distillation_sums(student, teacher, labels)
    mask = torch.ones(12)
    torch.testing.assert_close(kl, forward_kl(student.flatten(0, 1), teacher.flatten(0, 1), mask))
    torch.testing.assert_close(ce, cross_entropy(student.flatten(0, 1), labels.flatten(), mask))


def test_vectors_are_not_decayed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert {id(p) for p in free["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}
