import math

import pytest
import torch

from nemo_minitron.training.not_finite import first_bad


def parameters(**gradients):
    found = []
    for name, gradient in gradients.items():
        parameter = torch.nn.Parameter(torch.zeros(4))
        if gradient is not None:
            parameter.main_grad = torch.tensor(gradient)
        found.append((f"module.{name}", parameter))
    return found


def test_nothing_is_wrong():
    assert first_bad([torch.tensor(1.0)], parameters(a=[1.0, 2.0, 3.0, 4.0], b=None)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_comes_before_the_gradients_it_spoils(value):
    found = first_bad([torch.tensor(1.0), torch.tensor(value)], parameters(a=[math.nan] * 4))
    assert found == f"loss of micro-batch 1 is {value}"


def test_the_first_bad_gradient_is_named():
    found = first_bad([torch.tensor(1.0)], parameters(a=[0.0] * 4, b=[1.0, math.nan, math.inf, 0.0], c=[math.nan] * 4))
    assert found == "gradient of b has 2 of 4 values not finite"
