"""`aggregate` from sums equals the direct formulas on the per-sample statistics."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.arch import ArchSpec
from nemo_minitron.errors import ConfigError, ScoresError
from nemo_minitron.importance.aggregate import BATCH_AGGREGATIONS, Ranking, aggregate, importance
from nemo_minitron.importance.scores import SEQUENCE_STATISTICS, WIDTH_AXES, Scores, width_shape

SOURCE = ArchSpec(family="llama", num_layers=2, hidden_size=6, ffn_hidden_size=5, num_attention_heads=4,
                  num_query_groups=2, head_dim=4, vocab_size=16)

SEQUENCE_REFERENCE = {
    "mean": lambda a: np.abs(a).mean(),
    "l2": lambda a: np.linalg.norm(a),
    "var": lambda a: np.var(a),
}
BATCH_REFERENCE = {"mean": lambda x: np.abs(x).mean(), "l2": lambda x: np.linalg.norm(x), "var": lambda x: np.var(x)}


def scores_of(activations_by_axis, **tensors):
    """Scores from activations [samples, S, rows, units] per axis, one unit at a time."""
    for axis, activations in activations_by_axis.items():
        num_samples, _, num_rows, num_units = activations.shape
        for statistic, reduce in SEQUENCE_REFERENCE.items():
            per_sample = np.array([[[reduce(activations[n, :, row, unit]) for unit in range(num_units)]
                                    for row in range(num_rows)] for n in range(num_samples)])
            tensors[f"{axis}.{statistic}.sum"] = per_sample.sum(0)
            tensors[f"{axis}.{statistic}.sum_of_squares"] = (per_sample**2).sum(0)
    return Scores(source=SOURCE, num_samples=num_samples, samples_digest="", source_digest="", measures={},
                  tensors=tensors).check()


def reference(activations, batch, sequence):
    """Importance [rows, units] by two plain loops."""
    num_samples, _, num_rows, num_units = activations.shape
    out = np.empty((num_rows, num_units))
    for row in range(num_rows):
        for unit in range(num_units):
            statistics = [SEQUENCE_REFERENCE[sequence](activations[n, :, row, unit]) for n in range(num_samples)]
            out[row, unit] = BATCH_REFERENCE[batch](np.array(statistics))
    return out


@pytest.mark.parametrize("batch", BATCH_AGGREGATIONS)
@pytest.mark.parametrize("sequence", SEQUENCE_STATISTICS)
@pytest.mark.parametrize("axis", WIDTH_AXES)
def test_all_nine_aggregations_match_the_formulas(axis, batch, sequence):
    rng = np.random.default_rng(1)
    activations = rng.normal(size=(4, 7, *width_shape(SOURCE, axis)))
    expected = reference(activations, batch, sequence)
    actual = aggregate(scores_of({axis: activations}), axis, batch=batch, sequence=sequence)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)  # float64; var subtracts two close sums


@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.floats(-50, 50))
def test_default_is_l2_over_samples_of_the_mean_absolute_activation(num_samples, seed, offset):
    activations = np.random.default_rng(seed).normal(size=(num_samples, 3, 2, 5)) + offset
    expected = np.sqrt((np.abs(activations).mean(1) ** 2).sum(0))
    np.testing.assert_allclose(aggregate(scores_of({"ffn": activations}), "ffn"), expected, rtol=1e-12)


def test_variance_of_equal_samples_is_zero_and_never_negative():
    per_sample = 0.1 + np.random.default_rng(2).random((2, 5))
    sums = {"ffn.mean.sum": per_sample + per_sample + per_sample,
            "ffn.mean.sum_of_squares": per_sample**2 + per_sample**2 + per_sample**2}
    scores = Scores(source=SOURCE, num_samples=3, samples_digest="", source_digest="", measures={}, tensors=sums)
    variance = aggregate(scores, "ffn", batch="var")
    assert (variance >= 0).all()
    np.testing.assert_allclose(variance, 0, atol=1e-15)


def test_hidden_is_summed_over_the_norms_and_ffn_stays_per_layer():
    rng = np.random.default_rng(3)
    hidden, ffn = rng.normal(size=(4, 7, 5, 6)), rng.normal(size=(4, 7, 2, 5))
    scores = scores_of({"hidden": hidden, "ffn": ffn})
    per_norm = reference(hidden, "l2", "mean")
    np.testing.assert_allclose(importance(scores, "hidden"), per_norm[:4].sum(0))  # without the final norm
    np.testing.assert_allclose(importance(scores, "hidden", Ranking(norms=("pre_mlp", "final"))),
                               per_norm[1] + per_norm[3] + per_norm[4])
    np.testing.assert_allclose(importance(scores, "ffn"), reference(ffn, "l2", "mean"))


def test_summed_ranking_gives_every_layer_the_sum_over_layers():
    ffn = np.random.default_rng(3).normal(size=(4, 7, 2, 5))
    summed = importance(scores_of({"ffn": ffn}), "ffn", Ranking(ranking="summed"))
    np.testing.assert_allclose(summed, np.tile(reference(ffn, "l2", "mean").sum(0), (2, 1)))


@pytest.mark.parametrize(("axis", "size"), [("heads", 4), ("groups", 8)])
def test_channels_of_heads_become_the_norm_of_a_head_or_a_group(axis, size):
    channels = np.random.default_rng(4).normal(size=(4, 7, 2, 16))
    per_channel = reference(channels, "mean", "l2")
    expected = [[np.sqrt((row[first : first + size] ** 2).sum()) for first in range(0, 16, size)]
                for row in per_channel]
    found = importance(scores_of({"head_channels": channels}), axis, Ranking(batch="mean", sequence="l2"))
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(("change", "key"), [
    ({"method": "luck"}, "method"), ({"ranking": "global"}, "ranking"), ({"norms": ()}, "norms"),
    ({"norms": ("input", "input")}, "norms"), ({"norms": ("last",)}, "norms"),
])
def test_unknown_choice_is_named(change, key):
    with pytest.raises(ConfigError, match=rf"importance\.{key}"):
        Ranking(**change).check()


def test_layers_is_block_influence():
    scores = scores_of({"ffn": np.ones((1, 1, 2, 5))}, **{"layers.block_influence": np.array([0.3, 0.1])})
    np.testing.assert_array_equal(importance(scores, "layers"), [0.3, 0.1])


@pytest.mark.parametrize("axis", ["hidden", "heads", "groups", "layers"])
def test_axis_that_was_not_collected_is_named(axis):
    scores = scores_of({"ffn": np.ones((1, 1, 2, 5))})
    with pytest.raises(ScoresError, match=f"axis '{axis}'"):
        importance(scores, axis)


def test_unknown_aggregation_is_named():
    scores = scores_of({"ffn": np.ones((1, 1, 2, 5))})
    with pytest.raises(ConfigError, match=r"'max'.*importance\.batch"):
        aggregate(scores, "ffn", batch="max")
    with pytest.raises(ConfigError, match=r"'max'.*importance\.sequence"):
        aggregate(scores, "ffn", sequence="max")
