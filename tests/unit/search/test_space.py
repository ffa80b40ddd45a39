"""Enumeration: what a space holds, what its constraints leave, and what is said when nothing is left."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.arch import ArchSpec
from nemo_minitron.config_rounds import ConstraintsConfig, SearchConfig, TargetConfig, WindowConfig
from nemo_minitron.cost.flops import flops_per_token
from nemo_minitron.cost.serving import kv_cache_bytes, serving_bytes
from nemo_minitron.errors import ConfigError
from nemo_minitron.search.budget import Constraint
from nemo_minitron.search.recipe import candidates_of, expected_candidate
from nemo_minitron.search.space import UNFIT, Space, axis_sizes, enumerate_candidates

SOURCE = ArchSpec(family="llama", num_layers=4, hidden_size=256, ffn_hidden_size=512, num_attention_heads=8,
                  num_query_groups=4, head_dim=32, vocab_size=1000)


def search(**changes):
    node = SearchConfig(num_layers=[4, 3], hidden_size=[256, 192], ffn_hidden_size=[512, 384],
                        num_attention_heads=[8, 4], num_query_groups=[4, 2])
    return dataclasses.replace(node, **changes)


def test_the_product_without_what_cannot_be_pruned():
    """8 heads in 2 groups would be 4 a group, where the source has 2."""
    found = candidates_of(SOURCE, search())
    assert found.num_combinations == 32 and found.ruled_out == {UNFIT: 8}
    assert len(set(found.candidates)) == len(found.candidates) == 24
    assert found.candidates[0] == SOURCE


def test_axes_without_a_list():
    assert axis_sizes(SOURCE, "hidden_size", listed=[], smallest=None, divisor=64) == (256,)
    assert axis_sizes(SOURCE, "hidden_size", listed=[], smallest=100, divisor=64) == (256, 192, 128)
    odd = dataclasses.replace(SOURCE, hidden_size=250)
    assert axis_sizes(odd, "hidden_size", listed=[], smallest=128, divisor=64) == (250, 192, 128)
    assert axis_sizes(odd, "hidden_size", listed=[250, 64, 64], smallest=None, divisor=64) == (250, 64)


def test_expansions_are_rounded_to_the_divisor():
    node = search(ffn_hidden_size=[], ffn_expansion=[1.3, 2.0], num_query_groups=[], num_attention_heads=[])
    widths = {(arch.hidden_size, arch.ffn_hidden_size) for arch in candidates_of(SOURCE, node).candidates}
    assert widths == {(256, 320), (256, 512), (192, 256), (192, 384)}


def test_sizes_above_the_source_are_counted_not_refused():
    found = candidates_of(SOURCE, SearchConfig(hidden_size=[512, 192]))
    assert found.ruled_out[UNFIT] == 1 and len(found.candidates) == 1


@given(st.floats(0.3, 1.0), st.floats(0.3, 1.0), st.floats(0.3, 1.0))
def test_every_candidate_and_only_they_meet_all_constraints(parameters, flops, memory):
    constraints = ConstraintsConfig()
    constraints.num_parameters = WindowConfig(min=0.25, max=parameters)
    constraints.flops_per_token.max = flops
    constraints.memory.max_bytes, constraints.memory.batch_size = memory, 64
    node = search(constraints=constraints)

    def allowed(arch):
        whole = SOURCE.num_parameters()
        served, most = (serving_bytes(one, batch_size=64, seq_length=4096) for one in (arch, SOURCE))
        work, most_work = (flops_per_token(one, seq_length=4096) for one in (arch, SOURCE))
        return (0.25 * whole <= arch.num_parameters() <= parameters * whole and served <= memory * most
                and work <= flops * most_work)

    expected = [arch for arch in candidates_of(SOURCE, search()).candidates if allowed(arch)]
    if not expected:
        with pytest.raises(ConfigError, match="no architecture is left"):
            candidates_of(SOURCE, node)
        return
    found = candidates_of(SOURCE, node)
    assert list(found.candidates) == expected
    assert max(found.ruled_out.values()) <= found.num_combinations - len(expected)


def test_an_empty_set_says_how_many_each_constraint_rules_out():
    constraints = ConstraintsConfig()
    constraints.num_parameters = WindowConfig(min=0.9)
    constraints.flops_per_token.max = 0.5
    with pytest.raises(ConfigError, match=rf"one of 32.*{UNFIT} rules out 8, num_parameters rules out \d+, "
                                          r"flops_per_token rules out \d+.*search\.constraints"):
        candidates_of(SOURCE, search(constraints=constraints))


def test_another_measure_is_one_more_constraint():
    space = Space(num_layers=(4, 2), hidden_size=(256,), num_attention_heads=(8,), num_query_groups=(4,),
                  ffn_hidden_size=(512,))
    slow = Constraint(name="latency", measure=lambda arch: arch.num_layers * 1e-3, maximum=3e-3)
    found = enumerate_candidates(SOURCE, space, [slow])
    assert [arch.num_layers for arch in found.candidates] == [2] and found.ruled_out["latency"] == 1


def window(name, **bounds):
    return ConstraintsConfig(**{name: WindowConfig(**bounds)})


@pytest.mark.parametrize(("changes", "named"), [
    ({"constraints": window("num_parameters", max=10e9)}, "above the source.*search.constraints.num_parameters"),
    ({"constraints": window("num_non_embedding_parameters", min=10e9)}, "above the source.*non_embedding"),
    ({"constraints": window("num_parameters", min=0.5, max=0.4)}, "empty window.*num_parameters"),
    ({"constraints": window("num_parameters", max=-1.0)}, "bad budget.*num_parameters"),
    ({"hidden_size": [200]}, r"multiples of 64.*200.*search\.hidden_size"),
    ({"num_layers": [0]}, r"search\.num_layers"),
    ({"smallest": TargetConfig(num_layers=2)}, r"both.*search\.smallest\.num_layers"),
    ({"ffn_expansion": [2.0]}, "both.*search.ffn_expansion"),
    ({"ffn_hidden_size": [], "ffn_expansion": [-2.0]}, "search.ffn_expansion"),
])
def test_what_cannot_be_searched(changes, named):
    with pytest.raises(ConfigError, match=named):
        candidates_of(SOURCE, search(**changes))


def test_bad_smallest_sizes_and_spaces_that_are_too_large():
    with pytest.raises(ConfigError, match=r"search\.smallest\.hidden_size"):
        candidates_of(SOURCE, SearchConfig(smallest=TargetConfig(hidden_size=512)))
    sizes = tuple(range(1, 101))
    with pytest.raises(ConfigError, match="at most 500,000"):
        enumerate_candidates(SOURCE, Space(num_layers=sizes, hidden_size=sizes, num_attention_heads=sizes,
                                           num_query_groups=(1,), ffn_hidden_size=(1,)), [])


def test_the_expected_candidate_is_one_of_them():
    node = search(expected=TargetConfig(num_layers=3, hidden_size=192))
    found = candidates_of(SOURCE, node)
    arch = expected_candidate(found, node)
    assert (arch.num_layers, arch.hidden_size, arch.ffn_hidden_size) == (3, 192, 512)
    assert expected_candidate(found, search()) == max(found.candidates, key=ArchSpec.num_parameters)
    with pytest.raises(ConfigError, match=r"hidden_size 128.*search\.expected"):
        expected_candidate(found, search(expected=TargetConfig(hidden_size=128)))


def test_bytes_of_serving():
    """Two of 4 groups of 32 in 4 layers, 3 sequences of 10 tokens, 2 bytes."""
    assert kv_cache_bytes(SOURCE, batch_size=3, seq_length=10) == 2 * 4 * 4 * 32 * 3 * 10 * 2
    assert serving_bytes(SOURCE, batch_size=3, seq_length=10, bytes_per_element=1) == (
        SOURCE.num_parameters() + kv_cache_bytes(SOURCE, batch_size=3, seq_length=10, bytes_per_element=1))


def test_the_order_is_that_of_the_lists():
    found = candidates_of(SOURCE, search(num_query_groups=[], num_attention_heads=[]))
    shapes = [(arch.num_layers, arch.hidden_size, arch.ffn_hidden_size) for arch in found.candidates]
    assert shapes == list(itertools.product([4, 3], [256, 192], [512, 384]))
