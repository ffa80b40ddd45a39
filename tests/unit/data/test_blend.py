"""Mixtures of sources by weight."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.config import BlendSource
from nemo_minitron.data.batch import BlendedSamples, TokenSamples
from nemo_minitron.data.blend import CYCLE, Mixture, apportion, check_blend
from nemo_minitron.data.indexed import build, open_tokens
from nemo_minitron.data.samples import positions_for, sample_order
from nemo_minitron.errors import ConfigError, DataError

WEIGHTS = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@settings(max_examples=15, deadline=None)
@given(weights=WEIGHTS)
def test_every_source_has_its_share_to_within_one_after_any_number_of_samples(weights):
    mixture = Mixture(weights)
    sources = np.array([mixture.source_of(position)[0] for position in range(2 * CYCLE)])
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, len(sources) + 1)[:, None] * shares
    assert np.abs(counts - due).max() <= 1 + 1e-6


@settings(max_examples=15, deadline=None)
@given(weights=WEIGHTS)
def test_turns_of_a_source_are_numbered_without_a_gap(weights):
    mixture = Mixture(weights)
    turns = [mixture.source_of(position) for position in range(3 * sum(weights) + 7)]
    for source in range(len(weights)):
        mine = [nth for number, nth in turns if number == source]
        assert mine == list(range(len(mine)))


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.7, 0.2, 0.1], [1 / 8, 2.5]])
def test_shares_do_not_drift_over_a_long_training(weights):
    mixture, position = Mixture(weights), 30_000_001
    seen = {}
    while len(seen) < len(weights):
        source, nth = mixture.source_of(position)
        seen.setdefault(source, (nth, position))
        position += 1
    for source, (nth, after) in seen.items():
        assert abs(nth - after * weights[source] / sum(weights)) <= 1 + 1e-6


def test_shares_of_odd_weights_are_rounded_to_a_cycle():
    weights = [123_456_789, 987_654_321, 1.5e8]
    mixture = Mixture(weights)
    sources = np.bincount([mixture.source_of(position)[0] for position in range(CYCLE)])
    assert tuple(sources) == apportion(weights, CYCLE)


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), total=st.integers(0, 500))
def test_apportioned_numbers_add_up_and_are_within_one_of_their_share(weights, total):
    counts = apportion(weights, total)
    assert sum(counts) == total
    assert all(abs(count - weight / sum(weights) * total) <= 1 for count, weight in zip(counts, weights, strict=True))


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0], [1.0, 1e-9]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ConfigError, match="weight"):
        Mixture(weights)


@pytest.fixture
def sources(tmp_path):
    """Two token files: 40 samples of tokens below 100, 10 of tokens from 100 on."""
    found = []
    for name, low, num_samples in (("a", 0, 40), ("b", 100, 10)):
        tokens = low + np.arange(num_samples * 4 + 1) % 100
        build(tmp_path / name, [tokens], np.uint16)
        found.append(TokenSamples(open_tokens(tmp_path / name), 4))
    return found


def tokens_of(samples, positions):
    return samples.batch([samples.training_id(position, seed=3) for position in positions]).tokens


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_replicas_together_see_the_same_step(sources, dp, micro_batch_size):
    blended = BlendedSamples(sources, [3.0, 1.0])
    for step in range(5):
        seen = []
        for rank in range(dp):
            for positions in positions_for(step, global_batch_size=8, micro_batch_size=micro_batch_size, dp_rank=rank,
                                           dp_size=dp):
                seen += [(position, row.tolist()) for position, row in
                         zip(positions, tokens_of(blended, positions), strict=True)]
        expected = tokens_of(blended, range(8 * step, 8 * step + 8)).tolist()
        assert [row for _, row in sorted(seen)] == expected
        assert sum(row[0] >= 100 for row in expected) == 2


def test_many_sources_read_in_turn_are_permuted_once_an_epoch(monkeypatch):
    made = []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: made.append(tuple(key)) or real(key))
    sizes = range(1001, 1021)
    for position in range(30):
        for size in sizes:
            sample_order(position, size, seed=77)
    assert len(made) == len(sizes)


def test_a_blend_of_the_corpus_is_refused():
    with pytest.raises(ConfigError, match=r"data\.kind"):
        check_blend([BlendSource(name="a", path="x"), BlendSource(name="b", path="y")], None, "corpus")


def test_each_source_is_seen_whole_before_it_repeats(sources):
    blended = BlendedSamples(sources, [3.0, 1.0])
    tokens = tokens_of(blended, range(40))
    of_b = [tuple(row.tolist()) for row in tokens if row[0] >= 100]
    assert len(of_b) == 10 == len(set(of_b))


def test_held_out_samples_are_those_of_all_sources_one_after_another(sources):
    blended = BlendedSamples(sources, [3.0, 1.0])
    assert blended.num_evaluation_samples == 50
    batch = blended.batch([0, 39, 40, 49])
    expected = torch.cat([sources[0].batch([0, 39]).tokens, sources[1].batch([0, 9]).tokens])
    assert torch.equal(batch.tokens, expected)
    assert batch.sample_ids.tolist() == [0, 39, 40, 49]


def test_calibration_takes_from_each_by_weight(sources):
    ids = BlendedSamples(sources, [3.0, 1.0]).calibration_ids(12, seed=0)
    assert len(set(ids.tolist())) == 12 and (np.diff(ids) > 0).all()
    assert (ids >= 40).sum() == 3
    with pytest.raises(DataError, match="20 samples; found 10"):
        BlendedSamples(sources, [1.0, 1.0]).calibration_ids(40, seed=0)
