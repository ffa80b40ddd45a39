"""Choosing the next token: greedy, temperature, top-p, and draws that depend on seed, row and step alone."""

import pytest
import torch

from nemo_minitron.generate.sampling import Sampling, choose, uniforms

LOGITS = torch.tensor([[0.0, 2.0, 1.0, 2.0, -1.0]])
EVEN = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000


def sampled(**how):
    """How often each token is chosen from LOGITS, over evenly spread draws."""
    chosen = choose(LOGITS.expand(len(EVEN), -1), Sampling(max_new_tokens=1, **how), EVEN)
    return torch.bincount(chosen, minlength=LOGITS.size(1)) / len(EVEN)


def test_greedy_takes_the_first_of_the_largest():
    assert choose(LOGITS, Sampling(max_new_tokens=1), torch.zeros(1)).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_temperature_divides_the_logits(temperature):
    expected = (LOGITS[0].double() / temperature).softmax(-1)
    assert sampled(temperature=temperature).tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (0.9, [1, 2, 3]),
                                             (0.97, [0, 1, 2, 3])])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    probabilities = LOGITS[0].double().softmax(-1)
    expected = torch.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    assert sampled(temperature=1.0, top_p=top_p).tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_no_draw_reaches_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf]]).expand(2, -1)
    how = Sampling(max_new_tokens=1, temperature=1.0)
    assert choose(logits, how, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)).tolist() == [1, 1]


def test_a_draw_depends_on_seed_row_and_step_and_not_on_the_batch():
    together = uniforms(5, [3, 8, 4], 2)
    assert together[1] == uniforms(5, [8], 2)[0]
    others = [*uniforms(5, [3, 4], 2).tolist(), *uniforms(5, [8], 3).tolist(), *uniforms(6, [8], 2).tolist()]
    assert together[1].item() not in others
    many = uniforms(0, range(4000), 0)
    assert many.min() >= 0 and many.max() < 1
    assert many.mean() == pytest.approx(0.5, abs=0.02) and many.var() == pytest.approx(1 / 12, abs=0.005)
