"""Iterative importance: sizes on the way, and units ordered by how long they stayed."""

import dataclasses

import numpy as np
import pytest

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Plan
from nemo_minitron.importance.aggregate import Ranking
from nemo_minitron.importance.iterative import Survival, sizes_after
from nemo_minitron.importance.scores import Scores

SOURCE = ArchSpec(family="llama", num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8,
                  num_query_groups=4, head_dim=8, vocab_size=32)
TARGET = dataclasses.replace(SOURCE, hidden_size=40, ffn_hidden_size=32, num_layers=1, num_attention_heads=2,
                             num_query_groups=2)


def test_sizes_go_down_in_equal_steps_and_end_at_the_target():
    steps = [sizes_after(step, 4, SOURCE, TARGET, {"hidden_size": 8, "ffn_hidden_size": 16}) for step in range(4)]
    assert [sizes["hidden_size"] for sizes in steps] == [56, 48, 48, 40]  # 58, 52, 46, to multiples of 8
    assert [sizes["ffn_hidden_size"] for sizes in steps] == [80, 64, 48, 32]
    assert steps[-1] == {name: getattr(TARGET, name) for name in steps[-1]}
    for sizes in steps:
        dataclasses.replace(SOURCE, **sizes).check()


def test_one_step_is_one_shot():
    assert sizes_after(0, 1, SOURCE, TARGET, {})["hidden_size"] == TARGET.hidden_size


@pytest.fixture
def tiny():
    return ArchSpec(family="llama", num_layers=2, hidden_size=4, ffn_hidden_size=3, num_attention_heads=2,
                    num_query_groups=1, head_dim=2, vocab_size=8)


def scores_of(arch, **importance_by_axis):
    tensors = {}
    for axis, values in importance_by_axis.items():
        if axis == "layers":
            tensors["layers.block_influence"] = np.array(values, float)
        else:
            tensors[f"{axis}.mean.sum"] = tensors[f"{axis}.mean.sum_of_squares"] = np.array(values, float)
    return Scores(source=arch, num_samples=1, samples_digest="", source_digest="", measures={}, tensors=tensors)


def test_what_goes_later_is_worth_more_and_indices_are_the_sources(tiny):
    survival, how = Survival(tiny), Ranking(batch="mean")
    smaller = dataclasses.replace(tiny, num_layers=1, hidden_size=3, ffn_hidden_size=2)
    first = Plan(source=tiny, target=smaller, layers=(1,), hidden=(0, 2, 3), ffn=((0, 2),), heads=((0, 1),),
                 groups=((0,),))
    survival.add(scores_of(tiny, layers=[0.1, 0.4], hidden=np.tile([4, 1, 2, 3], (5, 1)), ffn=[[3, 2, 1], [2, 0, 4]],
                           heads=[[1, 2], [2, 1]], groups=[[1], [1]]), first, how)
    smallest = dataclasses.replace(smaller, hidden_size=2, ffn_hidden_size=1)
    second = Plan(source=smaller, target=smallest, layers=(0,), hidden=(1, 2), ffn=((0,),), heads=((0, 1),),
                  groups=((0,),))
    survival.add(scores_of(smaller, layers=[0.2], hidden=np.tile([1, 5, 10], (3, 1)), ffn=[[8, 2]],
                           heads=[[4, 2]], groups=[[1]]), second, how)
    values = survival.tensors()
    np.testing.assert_allclose(values["hidden.iterative"], [[1.05, 0.125, 1.25, 1.5]])
    np.testing.assert_allclose(values["ffn.iterative"], [[0.5, 1 / 3, 1 / 6], [1.5, 0.0, 1.125]])
    np.testing.assert_allclose(values["heads.iterative"], [[0.25, 0.5], [1.5, 1.25]])
    np.testing.assert_allclose(values["layers.iterative"], [0.125, 1.5])
