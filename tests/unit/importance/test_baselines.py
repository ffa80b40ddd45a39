"""Magnitude equals norms over plain tensors; random is a function of the seed."""

import numpy as np
import pytest
import torch

from nemo_minitron.importance.baselines import magnitude, random_importance
from nemo_minitron.importance.scores import tensor_shapes
from tests.support.checkpoints import UNTIED, write_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_is_the_norm_of_a_units_own_weights(tmp_path, dtype):
    tensors = {name: tensor.double() for name, tensor in write_llama(UNTIED, tmp_path, dtype=dtype).items()}
    found = magnitude(tmp_path, UNTIED)
    layer = "model.layers.2."
    gate, up, down = (tensors[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    queries, keys, values, out = (tensors[f"{layer}self_attn.{name}_proj.weight"] for name in "qkvo")
    neuron = torch.cat([gate[7], up[7], down[:, 7]]).norm()
    assert found["ffn.magnitude"][2, 7] == pytest.approx(float(neuron), rel=1e-6)
    size = UNTIED.head_dim
    head = torch.cat([queries[3 * size : 4 * size].flatten(), out[:, 3 * size : 4 * size].flatten()])
    assert found["heads.magnitude"][2, 3] == pytest.approx(float(head.norm()), rel=1e-6)
    group = torch.cat([keys[size : 2 * size].flatten(), values[size : 2 * size].flatten(),  # group 1: heads 2 and 3
                       queries[2 * size : 4 * size].flatten(), out[:, 2 * size : 4 * size].flatten()])
    assert found["groups.magnitude"][2, 1] == pytest.approx(float(group.norm()), rel=1e-6)
    channel = torch.cat([(tensor if tensor.shape[1] == UNTIED.hidden_size else tensor.T)[:, 5]
                         for tensor in tensors.values() if tensor.dim() == 2])
    assert found["hidden.magnitude"][0, 5] == pytest.approx(float(channel.norm()), rel=1e-6)
    whole = torch.cat([tensor.flatten() for name, tensor in tensors.items() if layer in name and tensor.dim() == 2])
    assert found["layers.magnitude"][2] == pytest.approx(float(whole.norm()), rel=1e-6)


def test_shapes_are_those_of_scores(tmp_path):
    write_llama(UNTIED, tmp_path)
    shapes = tensor_shapes(UNTIED)
    for tensors in (magnitude(tmp_path, UNTIED), random_importance(UNTIED, 1)):
        assert len(tensors) == 5
        assert all(tensor.shape == shapes[name] for name, tensor in tensors.items())


def test_random_depends_on_seed_and_axis():
    first, again, other = (random_importance(UNTIED, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["ffn.random"], other["ffn.random"])
    assert not np.array_equal(first["heads.random"][:, :4], first["groups.random"])
