"""Which shapes are refused; counting parameters is tested against `transformers` with the families."""

import dataclasses

import pytest

from nemo_minitron.arch import ArchSpec, Rope, RopeScaling
from nemo_minitron.errors import ArchError
from tests.support.tiny_llama import NEMOTRON, QWEN2, QWEN3, UNTIED


@pytest.mark.parametrize(("changes", "complaint"), [
    ({"num_layers": 0}, "num_layers to be a positive integer; found 0"),
    ({"head_dim": 2.0}, "head_dim to be a positive integer; found 2.0"),
    ({"num_query_groups": 3}, "multiple of num_query_groups; found 4 heads and 3 groups"),
    ({"norm": "batchnorm"}, "norm to be one of rmsnorm, layernorm_1p; found 'batchnorm'"),
    ({"activation": "gelu"}, "activation to be one of swiglu, squared_relu; found 'gelu'"),
    ({"rotary_fraction": 0.0}, "even number of rotated dims"),
    ({"rotary_fraction": 1.5}, "even number of rotated dims"),
    ({"rotary_fraction": 0.1875}, r"head_dim 16 \* rotary fraction 0.1875"),  # 3 dims
    ({"head_dim": 5}, "even number of rotated dims"),
])
def test_shapes_that_are_refused(changes, complaint):
    with pytest.raises(ArchError, match=complaint):
        dataclasses.replace(UNTIED, **changes).check()


@pytest.mark.parametrize("fraction", [0.125, 0.5, 1.0])
def test_rotated_parts_that_are_taken(fraction):
    assert dataclasses.replace(UNTIED, rotary_fraction=fraction).check()


@pytest.mark.parametrize("arch", [QWEN2, QWEN3, NEMOTRON, dataclasses.replace(UNTIED, rope=Rope(scaling=RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)))])
def test_plain_data_and_back(arch):
    assert ArchSpec.from_dict(arch.to_dict()) == arch


def test_parameters_one_by_one():
    """Hidden 32, FFN 64, 4 heads and 2 groups of 16, 101 tokens, written out."""
    attention = 32 * 64 + 2 * 32 * 32 + 64 * 32
    assert UNTIED.num_non_embedding_parameters() == 4 * (attention + 3 * 32 * 64 + 2 * 32) + 32
    assert QWEN2.num_non_embedding_parameters() - UNTIED.num_non_embedding_parameters() == 4 * (64 + 32 + 32)
    assert QWEN3.num_non_embedding_parameters() - UNTIED.num_non_embedding_parameters() == 4 * 2 * 16
    assert NEMOTRON.num_non_embedding_parameters() == 3 * (attention + 2 * 32 * 64 + 4 * 32) + 2 * 32
    assert (QWEN2.num_embedding_parameters(), UNTIED.num_embedding_parameters()) == (101 * 32, 2 * 101 * 32)
