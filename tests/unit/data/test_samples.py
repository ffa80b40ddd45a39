import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.data.samples import SampleSpec, positions_for, sample_order
from nemo_minitron.errors import ConfigError, DataError


@given(num_tokens=st.integers(0, 200), seq_length=st.integers(1, 40))
def test_every_token_but_the_first_is_predicted_exactly_once(num_tokens, seq_length):
    spec = SampleSpec(num_tokens, seq_length)
    labels = []
    for sample_id in range(spec.num_evaluation_samples):
        start, count = spec.token_range(sample_id)
        assert 2 <= count <= seq_length + 1
        labels += range(start + 1, start + count)
    assert labels == list(range(1, num_tokens))
    assert spec.num_labels == len(labels)


@given(num_tokens=st.integers(0, 200), seq_length=st.integers(1, 40))
def test_training_samples_are_the_full_ones(num_tokens, seq_length):
    spec = SampleSpec(num_tokens, seq_length)
    counts = [spec.token_range(sample_id)[1] for sample_id in range(spec.num_evaluation_samples)]
    assert spec.num_training_samples == counts.count(seq_length + 1)
    assert all(count == seq_length + 1 for count in counts[: spec.num_training_samples])


def test_a_stream_without_a_full_sample_is_refused():
    assert SampleSpec(9, 8).check_training().num_training_samples == 1
    with pytest.raises(DataError, match=r"at least 9 tokens; found 8 .*data\.seq_length"):
        SampleSpec(8, 8).check_training()


def test_each_epoch_is_another_permutation():
    order = [sample_order(position, 20, seed=3) for position in range(60)]
    epochs = [order[first : first + 20] for first in (0, 20, 40)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert order[:20] == np.random.default_rng([3, 0]).permutation(20).tolist()
    assert [sample_order(position, 20, seed=4) for position in range(20)] != epochs[0]


def test_order_depends_on_the_position_alone():
    forward = [sample_order(position, 13, seed=1) for position in range(200)]
    backward = [sample_order(position, 13, seed=1) for position in reversed(range(200))]
    assert forward == backward[::-1]


def _step_positions(step, dp_size, micro_batch_size):
    return [positions_for(step, global_batch_size=24, micro_batch_size=micro_batch_size, dp_rank=rank,
                          dp_size=dp_size) for rank in range(dp_size)]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
def test_replicas_share_the_same_global_batch_without_overlap(dp_size, micro_batch_size):
    for step in (0, 1, 17):
        replicas = _step_positions(step, dp_size, micro_batch_size)
        assert {len(replica) for replica in replicas} == {24 // dp_size // micro_batch_size}
        assert all(len(micro_batch) == micro_batch_size for replica in replicas for micro_batch in replica)
        everything = [position for replica in replicas for micro_batch in replica for position in micro_batch]
        assert sorted(everything) == list(range(24 * step, 24 * (step + 1)))


def test_resume_at_another_degree_continues_the_same_samples():
    uninterrupted = [{sample_order(p, 50, 0) for m in _step_positions(step, 1, 6)[0] for p in m}
                     for step in range(10)]
    resumed = [{sample_order(p, 50, 0) for replica in _step_positions(step, 4, 2) for m in replica for p in m}
               for step in range(6, 10)]
    assert resumed == uninterrupted[6:]


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(5, 1), (4, 4), (0, 1)])
def test_batch_sizes_that_do_not_divide_are_refused(micro_batch_size, dp_size):
    with pytest.raises(ConfigError, match=r"train\.global_batch_size.*train\.micro_batch_size"):
        positions_for(0, global_batch_size=24, micro_batch_size=micro_batch_size, dp_rank=0, dp_size=dp_size)
