"""Torch <-> stored numbers."""

import pytest
import torch

from nemo_minitron.checkpoint.container import NUMPY_DTYPES
from nemo_minitron.checkpoint.numbers import TORCH_DTYPES, to_numpy, to_torch


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_round_trip_is_bit_exact(name):
    tensor = torch.randn(5, 4).to(TORCH_DTYPES[name]).T
    array = to_numpy(tensor)
    assert array.dtype == NUMPY_DTYPES[name]
    assert torch.equal(to_torch(array, name), tensor)
