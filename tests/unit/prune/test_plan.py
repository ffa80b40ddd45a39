"""`make_plan`: sizes, order, ties, nesting, and what it refuses. Pure, on random scores."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Plan
from nemo_minitron.errors import ArchError, ConfigError, ScoresError, UserError
from nemo_minitron.importance.scores import Scores, tensor_shapes
from nemo_minitron.prune.plan import make_plan, top_indices

PRUNED = ("num_layers", "hidden_size", "ffn_hidden_size")
SOURCE = ArchSpec(family="llama", num_layers=4, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4,
                  num_query_groups=2, head_dim=4, vocab_size=16)


def make_scores(source, seed=0, num_levels=None):
    """Random scores; with `num_levels` only so many different values, hence ties."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return rng.random(shape) if num_levels is None else rng.integers(num_levels, size=shape) / 2.0

    tensors = {name: draw(shape) for name, shape in tensor_shapes(source).items()}
    return Scores(source=source, num_samples=3, samples_digest="", source_digest="", measures={}, tensors=tensors)


@st.composite
def arch_specs(draw):
    groups = draw(st.integers(1, 3))
    return ArchSpec(family="llama", num_layers=draw(st.integers(1, 5)), hidden_size=draw(st.integers(1, 12)),
                    ffn_hidden_size=draw(st.integers(1, 12)), num_attention_heads=groups * draw(st.integers(1, 3)),
                    num_query_groups=groups, head_dim=2 * draw(st.integers(1, 3)), vocab_size=8,
                    tied_embeddings=draw(st.booleans()))


@st.composite
def sources_and_targets(draw):
    """A source and two targets, the second no larger than the first on any axis."""
    source = draw(arch_specs())
    larger = {key: draw(st.integers(1, getattr(source, key))) for key in PRUNED}
    smaller = {key: draw(st.integers(1, size)) for key, size in larger.items()}
    return source, larger, smaller


def rows_of(plan):
    return [plan.layers, plan.hidden, *plan.ffn, *plan.heads, *plan.groups]


@given(sources_and_targets(), st.integers(0, 1000))
def test_plan_has_the_target_sizes_and_ascending_source_indices(drawn, seed):
    source, target, _ = drawn
    plan = make_plan(source, target, make_scores(source, seed))
    assert plan.target == dataclasses.replace(source, **target)
    assert len(plan.layers) == target["num_layers"]
    assert len(plan.hidden) == target["hidden_size"]
    assert [len(row) for row in plan.ffn] == [target["ffn_hidden_size"]] * target["num_layers"]
    assert plan.heads == (tuple(range(source.num_attention_heads)),) * target["num_layers"]
    assert plan.groups == (tuple(range(source.num_query_groups)),) * target["num_layers"]
    for row in rows_of(plan):
        assert all(type(index) is int for index in row)
        assert list(row) == sorted(set(row))
    assert plan.hidden[-1] < source.hidden_size
    assert plan.layers[-1] < source.num_layers
    assert all(row[-1] < source.ffn_hidden_size for row in plan.ffn)


@given(sources_and_targets(), st.integers(0, 1000), st.sampled_from([None, 1, 2]))
def test_smaller_target_keeps_a_subset(drawn, seed, num_levels):
    source, larger, smaller = drawn
    scores = make_scores(source, seed, num_levels)
    wide, narrow = make_plan(source, larger, scores), make_plan(source, smaller, scores)
    assert set(narrow.layers) <= set(wide.layers)
    assert set(narrow.hidden) <= set(wide.hidden)
    ffn_of = dict(zip(wide.layers, wide.ffn, strict=True))
    for layer, row in zip(narrow.layers, narrow.ffn, strict=True):
        assert set(row) <= set(ffn_of[layer])


@given(sources_and_targets(), st.integers(0, 1000))
def test_ties_keep_the_lower_index(drawn, seed):
    source, target, _ = drawn
    scores = make_scores(source, seed, num_levels=2)
    plan = make_plan(source, target, scores)
    assert plan == make_plan(source, target, make_scores(source, seed, num_levels=2))
    per_layer = np.sqrt(scores.tensors["ffn.mean.sum_of_squares"])
    ranked = {"layers": (plan.layers, scores.tensors["layers.block_influence"]),
              "hidden": (plan.hidden, np.sqrt(scores.tensors["hidden.mean.sum_of_squares"]).sum(0)),
              **{f"ffn {layer}": (row, per_layer[layer])
                 for layer, row in zip(plan.layers, plan.ffn, strict=True)}}
    for axis, (kept, values) in ranked.items():
        reference = sorted(range(len(values)), key=lambda unit, values=values: (-values[unit], unit))[: len(kept)]
        assert set(kept) == set(reference), axis


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_top_indices_of_all_sizes(values, data):
    num_kept = data.draw(st.integers(0, len(values)))
    kept = top_indices(np.array(values, float), num_kept)
    dropped = [index for index in range(len(values)) if index not in kept]
    assert len(kept) == num_kept
    for low in dropped:
        assert all(values[index] > values[low] or (values[index] == values[low] and index < low) for index in kept)


def test_hand_made_example():
    tensors = {
        "layers.block_influence": np.array([0.5, 0.1, 0.3, 0.4]),
        "ffn.mean.sum": np.zeros((4, 12)), "ffn.mean.sum_of_squares": np.arange(48.0).reshape(4, 12) % 7,
    }
    scores = Scores(source=SOURCE, num_samples=1, samples_digest="", source_digest="", measures={}, tensors=tensors)
    plan = make_plan(SOURCE, {"num_layers": 2, "ffn_hidden_size": 2}, scores)
    assert plan.layers == (0, 3)
    assert plan.ffn == ((5, 6), (4, 5))  # layer 0: values 0..6, 0..4; layer 3: 1..6, 0..5
    assert plan.hidden == tuple(range(8))
    assert plan.scores_digest == scores.digest()


def test_aggregation_is_passed_on():
    shape = (4, 12)
    tensors = {"ffn.mean.sum": np.zeros(shape), "ffn.mean.sum_of_squares": np.tile(np.arange(12.0), (4, 1)),
               "ffn.l2.sum": np.tile(np.arange(12.0)[::-1], (4, 1)), "ffn.l2.sum_of_squares": np.zeros(shape)}
    scores = Scores(source=SOURCE, num_samples=1, samples_digest="", source_digest="", measures={}, tensors=tensors)
    assert make_plan(SOURCE, {"ffn_hidden_size": 2}, scores).ffn[0] == (10, 11)
    assert make_plan(SOURCE, {"ffn_hidden_size": 2}, scores, batch="mean", sequence="l2").ffn[0] == (0, 1)


@pytest.mark.parametrize("target", [{}, {key: getattr(SOURCE, key) for key in (*PRUNED, "num_attention_heads")}])
def test_identity_needs_no_scores(target):
    plan = make_plan(SOURCE, target, None)
    assert plan.target == SOURCE
    assert plan.scores_digest is None
    assert plan.layers == (0, 1, 2, 3)
    assert plan.ffn == (tuple(range(12)),) * 4
    assert plan.heads == (tuple(range(4)),) * 4


@given(sources_and_targets())
@settings(max_examples=20)
def test_plan_survives_json(drawn):
    source, target, _ = drawn
    plan = make_plan(source, target, make_scores(source))
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("key", (*PRUNED, "num_attention_heads", "num_query_groups"))
@pytest.mark.parametrize("size", [0, -1, 1000, 2.0, "4", True, None])
def test_size_that_does_not_fit_names_its_key(key, size):
    with pytest.raises(ArchError, match=rf"prune\.target\.{key}\)"):
        make_plan(SOURCE, {key: size}, make_scores(SOURCE))


@pytest.mark.parametrize(("key", "size"), [("num_attention_heads", 2), ("num_query_groups", 1)])
def test_heads_are_not_pruned(key, size):
    with pytest.raises(UserError, match=rf"not pruned.*prune\.target\.{key}"):
        make_plan(SOURCE, {key: size}, make_scores(SOURCE))


def test_unknown_key_is_named():
    with pytest.raises(ConfigError, match=r"'hiden_size'.*prune\.target\.hiden_size"):
        make_plan(SOURCE, {"hiden_size": 4}, make_scores(SOURCE))


def test_cut_axis_without_scores_is_refused():
    with pytest.raises(ScoresError, match="axis 'ffn'"):
        make_plan(SOURCE, {"ffn_hidden_size": 4}, None)
    only_depth = {"layers.block_influence": np.ones(4)}
    scores = Scores(source=SOURCE, num_samples=1, samples_digest="", source_digest="", measures={}, tensors=only_depth)
    assert make_plan(SOURCE, {"num_layers": 2}, scores).layers == (0, 1)
    with pytest.raises(ScoresError, match="axis 'hidden'"):
        make_plan(SOURCE, {"hidden_size": 4}, scores)


def test_scores_of_another_model_are_refused():
    other = dataclasses.replace(SOURCE, hidden_size=10)
    with pytest.raises(ScoresError, match="expected hidden_size 8; found hidden_size 10"):
        make_plan(SOURCE, {}, make_scores(other))
