"""`make_plan`: sizes, order, ties, nesting, and what it refuses. Pure, on random scores."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Plan
from nemo_minitron.errors import ArchError, ConfigError, ScoresError
from nemo_minitron.importance.aggregate import Ranking
from nemo_minitron.importance.scores import Scores, tensor_shapes
from nemo_minitron.prune.plan import LayerChoice, make_plan, top_indices

PRUNED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "num_attention_heads")
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
    larger = smaller_sizes(draw, source)
    return source, larger, smaller_sizes(draw, dataclasses.replace(source, **larger))


def smaller_sizes(draw, arch):
    sizes = {key: draw(st.integers(1, getattr(arch, key))) for key in PRUNED[:-1]}
    return {**sizes, "num_attention_heads": sizes["num_query_groups"] * draw(st.integers(1, arch.heads_per_group))}


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
    for heads, groups in zip(plan.heads, plan.groups, strict=True):
        assert len(groups) == target["num_query_groups"] and groups[-1] < source.num_query_groups
        in_groups = [head // source.heads_per_group for head in heads]
        assert in_groups == [group for group in groups for _ in range(plan.target.heads_per_group)]
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
    for axis in ("ffn", "heads", "groups"):
        of_wide = dict(zip(wide.layers, getattr(wide, axis), strict=True))
        for layer, row in zip(narrow.layers, getattr(narrow, axis), strict=True):
            assert set(row) <= set(of_wide[layer]), axis


@given(sources_and_targets(), st.integers(0, 1000))
def test_ties_keep_the_lower_index(drawn, seed):
    source, target, _ = drawn
    scores = make_scores(source, seed, num_levels=2)
    plan = make_plan(source, target, scores)
    assert plan == make_plan(source, target, make_scores(source, seed, num_levels=2))
    per_layer = np.sqrt(scores.tensors["ffn.mean.sum_of_squares"])
    ranked = {"layers": (plan.layers, scores.tensors["layers.block_influence"]),
              "hidden": (plan.hidden, np.sqrt(scores.tensors["hidden.mean.sum_of_squares"])[:-1].sum(0)),
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
    other = Ranking(batch="mean", sequence="l2")
    assert make_plan(SOURCE, {"ffn_hidden_size": 2}, scores, ranking=other).ffn[0] == (0, 1)


@pytest.mark.parametrize("target", [{}, {key: getattr(SOURCE, key) for key in PRUNED}])
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


@pytest.mark.parametrize("key", PRUNED)
@pytest.mark.parametrize("size", [0, -1, 1000, 2.0, "4", True, None])
def test_size_that_does_not_fit_names_its_key(key, size):
    with pytest.raises(ArchError, match=rf"prune\.target\.{key}\)"):
        make_plan(SOURCE, {key: size}, make_scores(SOURCE))


WIDE = dataclasses.replace(SOURCE, num_layers=2, num_attention_heads=8)


def head_scores(heads, groups=((1, 1), (1, 1)), arch=WIDE):
    tensors = {"heads.mean.sum": np.zeros((2, 8)), "heads.mean.sum_of_squares": np.array(heads, float),
               "groups.mean.sum": np.zeros((2, 2)), "groups.mean.sum_of_squares": np.array(groups, float)}
    return Scores(source=arch, num_samples=1, samples_digest="", source_digest="", measures={}, tensors=tensors)


def test_every_group_keeps_its_own_best_heads():
    scores = head_scores([[9, 8, 7, 6, 1, 2, 3, 4], [1, 2, 3, 4, 9, 9, 9, 9]])
    plan = make_plan(WIDE, {"num_attention_heads": 4}, scores)
    assert plan.heads == ((0, 1, 6, 7), (2, 3, 4, 5))
    assert plan.head_pairs == ()


def test_groups_go_with_their_heads():
    plan = make_plan(WIDE, {"num_query_groups": 1}, head_scores(np.ones((2, 8)), [[1, 2], [2, 1]]))
    assert plan.target.num_attention_heads == 4
    assert plan.groups == ((1,), (0,))
    assert plan.heads == ((4, 5, 6, 7), (0, 1, 2, 3))


def test_channels_of_heads_are_ranked_by_their_norm():
    channels = np.zeros((2, 8, 4))
    channels[:, [1, 5], 0] = 3.0  # norm 3 against 2 * 1.4 of four equal channels
    channels[:, [2, 6]] = 1.4
    tensors = {"head_channels.mean.sum": np.zeros((2, 32)),
               "head_channels.mean.sum_of_squares": channels.reshape(2, 32) ** 2}
    scores = Scores(source=WIDE, num_samples=1, samples_digest="", source_digest="", measures={}, tensors=tensors)
    assert make_plan(WIDE, {"num_attention_heads": 2}, scores).heads == ((1, 5), (1, 5))


def test_heads_are_paired_inside_their_group_around_the_cut():
    scores = head_scores([[9, 8, 7, 6, 1, 2, 3, 4]] * 2)
    plan = make_plan(WIDE, {"num_attention_heads": 6}, scores, head_residual=0.5)
    assert plan.head_pairs[0] == ((2, 3), (5, 4))  # K = 3, L = 4: only i = 3, with head 2K - i + 1 = 4
    plan = make_plan(WIDE, {"num_attention_heads": 4}, scores, head_residual=0.5)
    assert plan.head_pairs[0] == ((0, 3), (1, 2), (7, 4), (6, 5))  # i = 1 and 2, with 4 and 3
    assert plan.head_residual == 0.5


@pytest.mark.parametrize(("heads", "found"), [(8, "no head is cut"), (2, "cannot be paired")])
def test_heads_that_cannot_be_paired_are_refused(heads, found):
    with pytest.raises(ConfigError, match=rf"{found}.*prune\.head_residual"):
        make_plan(WIDE, {"num_attention_heads": heads}, head_scores(np.ones((2, 8))), head_residual=1.0)


@pytest.mark.parametrize("sizes", [{"num_attention_heads": 3}, {"num_query_groups": 1, "num_attention_heads": 8}])
def test_heads_must_spread_over_the_groups(sizes):
    with pytest.raises(ArchError, match=r"KV group.*prune\.target\.num_attention_heads"):
        make_plan(WIDE, sizes, None)


def test_layers_summed_give_every_layer_the_same_neurons():
    scores = make_scores(SOURCE)
    plan = make_plan(SOURCE, {"ffn_hidden_size": 5}, scores, ranking=Ranking(ranking="summed"))
    totals = np.sqrt(scores.tensors["ffn.mean.sum_of_squares"]).sum(0)
    assert plan.ffn == (tuple(sorted(np.argsort(-totals)[:5].tolist())),) * 4


def test_norms_are_chosen_for_hidden():
    scores = make_scores(SOURCE)
    rows = np.sqrt(scores.tensors["hidden.mean.sum_of_squares"])
    for norms, chosen in ((("final",), [8]), (("input",), [0, 2, 4, 6]), (("pre_mlp", "final"), [1, 3, 5, 7, 8])):
        plan = make_plan(SOURCE, {"hidden_size": 3}, scores, ranking=Ranking(norms=norms))
        assert plan.hidden == tuple(sorted(np.argsort(-rows[chosen].sum(0))[:3].tolist()))


def depth_scores(**tensors):
    named = {name.replace("__", "."): np.array(values, float) for name, values in tensors.items()}
    return Scores(source=SOURCE, num_samples=1, samples_digest="", source_digest="", measures={}, tensors=named)


def test_layers_by_loss_by_accuracy_and_by_removal_order():
    scores = depth_scores(layers__loss__1=[9, 3, 4, 8], layers__accuracy__1=[0.9, 0.1, 0.8, 0.7],
                          **{"layers.logit_mse.removal_order": [0, 2, 1, 3]})
    kept = {by: make_plan(SOURCE, {"num_layers": 2}, scores, layers=LayerChoice(by=by)).layers
            for by in ("loss", "accuracy", "removal_order")}
    assert kept == {"loss": (0, 3), "accuracy": (1, 3), "removal_order": (1, 3)}


def test_contiguous_block_is_measured_as_a_whole_and_the_first_of_equals_goes():
    scores = depth_scores(layers__loss__2=[5, 2, 2], layers__block_influence=[4, 1, 1, 1])
    assert make_plan(SOURCE, {"num_layers": 2}, scores,
                     layers=LayerChoice(by="loss", contiguous=True)).layers == (0, 3)
    assert make_plan(SOURCE, {"num_layers": 2}, scores, layers=LayerChoice(contiguous=True)).layers == (0, 3)


def test_listed_layers_go_and_need_no_scores():
    plan = make_plan(SOURCE, {}, None, layers=LayerChoice(drop=(2, 0)))
    assert plan.layers == (1, 3) and plan.target.num_layers == 2


@pytest.mark.parametrize(("sizes", "drop"), [({}, (1, 1)), ({}, (4,)), ({}, (-1,)), ({}, ()), ({}, (0, 1, 2, 3)),
                                             ({"num_layers": 2}, (1,))])
def test_bad_list_of_layers_is_refused(sizes, drop):
    with pytest.raises(ConfigError, match=r"prune\.layers\.drop"):
        make_plan(SOURCE, sizes, None, layers=LayerChoice(drop=drop))


def test_layer_metric_that_was_not_collected_is_named():
    with pytest.raises(ScoresError, match=r"expected layers\.loss\.2"):
        make_plan(SOURCE, {"num_layers": 2}, depth_scores(layers__loss__1=[1, 2, 3, 4]),
                  layers=LayerChoice(by="loss", contiguous=True))


@pytest.mark.parametrize("method", ["random", "magnitude", "iterative"])
def test_static_methods_rank_by_their_own_tensors(method):
    scores = make_scores(SOURCE)
    plan = make_plan(SOURCE, {"hidden_size": 3, "num_layers": 3}, scores, ranking=Ranking(method=method))
    assert plan.hidden == top_indices(scores.tensors[f"hidden.{method}"][0], 3)
    assert plan.layers == top_indices(scores.tensors[f"layers.{method}"], 3)


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
