"""How layers are dealt to pipeline stages, and which models a layout refuses."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.errors import LayoutError
from nemo_minitron.parallel.layout import Layout
from tests.support.checkpoints import UNTIED


@pytest.mark.parametrize(("num_layers", "pp", "expected"), [
    (4, 1, (4,)), (4, 2, (2, 2)), (5, 2, (3, 2)), (3, 2, (2, 1)), (7, 4, (2, 2, 2, 1)), (3, 3, (1, 1, 1)),
])
def test_layers_of_the_stages(num_layers, pp, expected):
    assert Layout(pp=pp).stage_layers(num_layers) == expected


@given(st.integers(1, 12), st.integers(0, 40))
def test_stages_are_even_none_is_empty_and_the_first_are_the_longer(pp, more):
    stages = Layout(pp=pp).stage_layers(pp + more)
    assert sum(stages) == pp + more and len(stages) == pp
    assert max(stages) - min(stages) <= 1 and min(stages) >= 1
    assert list(stages) == sorted(stages, reverse=True)


def arch(**changes):
    return dataclasses.replace(UNTIED, **changes)


@pytest.mark.parametrize(("layout", "changes"), [
    (Layout(), {}), (Layout(pp=2), {"num_layers": 5}), (Layout(pp=4), {}), (Layout(tp=4, pp=3), {}),
    (Layout(tp=2, sequence_parallel=True), {}),
])
def test_models_that_fit(layout, changes):
    layout.check(arch(**changes), name="teacher", seq_length=16)


@pytest.mark.parametrize(("layout", "changes", "complaint"), [
    (Layout(pp=5), {}, "teacher; expected at most 4 stages, one for each layer; found pp=5.*parallel.pp"),
    (Layout(tp=3), {"num_query_groups": 1}, "8 attention heads to be a multiple of tp; found tp=3.*parallel.tp"),
    (Layout(tp=8), {}, "4 KV groups to be a multiple of tp; found tp=8.*parallel.tp"),
    (Layout(tp=4), {"ffn_hidden_size": 42}, "42 FFN neurons to be a multiple of tp; found tp=4.*parallel.tp"),
    (Layout(tp=4, sequence_parallel=True), {},
     "18 tokens a sample to be a multiple of tp; found tp=4.*data.seq_length"),
])
def test_models_that_do_not_fit(layout, changes, complaint):
    with pytest.raises(LayoutError, match=complaint):
        layout.check(arch(**changes), name="teacher", seq_length=18)


def test_the_number_of_processes():
    layout = Layout(tp=2, pp=3, dp=4)
    layout.check_world(24)
    with pytest.raises(LayoutError, match=r"2\*3\*4 = 24 processes; found 8"):
        layout.check_world(8)
