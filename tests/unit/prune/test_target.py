"""`resolve_target`: sizes, ratios, budgets and lists of layers, alone and together."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nemo_minitron.arch import ArchSpec
from nemo_minitron.errors import ArchError, ConfigError
from nemo_minitron.prune.target import resolve_target

LLAMA_8B = ArchSpec(family="llama", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32,
                    num_query_groups=8, head_dim=128, vocab_size=128256)
DIVISORS = {"hidden_size": 64, "ffn_hidden_size": 64}


def test_ratios_round_to_their_divisor_and_one_keeps_the_size():
    target = resolve_target(LLAMA_8B, sizes={}, divisors={"hidden_size": 1024, "ffn_hidden_size": 256},
                            ratios={"hidden_size": 0.7, "ffn_hidden_size": 0.64, "num_layers": 0.5,
                                    "num_attention_heads": 0.75, "num_query_groups": 1.0})
    assert (target.hidden_size, target.ffn_hidden_size, target.num_layers) == (3072, 9216, 16)
    assert (target.num_attention_heads, target.num_query_groups, target.head_dim) == (24, 8, 128)
    odd = dataclasses.replace(LLAMA_8B, hidden_size=4000)
    assert resolve_target(odd, sizes={}, ratios={"hidden_size": 1.0}, divisors=DIVISORS).hidden_size == 4000
    assert resolve_target(odd, sizes={}, ratios={"hidden_size": 0.001}, divisors=DIVISORS).hidden_size == 64


def test_groups_alone_take_their_heads_with_them():
    assert resolve_target(LLAMA_8B, sizes={"num_query_groups": 6}).num_attention_heads == 24
    multi_head = dataclasses.replace(LLAMA_8B, num_query_groups=32)
    assert resolve_target(multi_head, sizes={"num_attention_heads": 20}).num_query_groups == 20


def test_budget_of_4_5_billion_gives_nearly_the_shape_of_the_published_width_model():
    target = resolve_target(LLAMA_8B, sizes={}, budget=4.515e9, divisors={"hidden_size": 1024, "ffn_hidden_size": 256})
    assert target.hidden_size == 3072  # arXiv:2408.11796: 3072 and 9216, 4.51 B parameters
    assert abs(target.ffn_hidden_size - 9216) <= 512
    assert (target.num_layers, target.num_attention_heads) == (32, 32)


@st.composite
def budgets(draw):
    groups = draw(st.integers(1, 3))
    source = ArchSpec(family="llama", num_layers=draw(st.integers(1, 4)), hidden_size=draw(st.integers(4, 90)),
                      ffn_hidden_size=draw(st.integers(4, 90)), num_attention_heads=groups * draw(st.integers(1, 2)),
                      num_query_groups=groups, head_dim=4, vocab_size=10, tied_embeddings=draw(st.booleans()))
    divisors = {"hidden_size": draw(st.sampled_from([1, 4, 8])), "ffn_hidden_size": draw(st.sampled_from([1, 4, 8]))}
    fixed = draw(st.sampled_from([{}, {"hidden_size": source.hidden_size // 2}, {"ffn_hidden_size": 3}]))
    return source, divisors, fixed, draw(st.floats(0.2, 1.0)), draw(st.booleans())


@given(budgets())
def test_budget_is_met_and_nearly_used_up(drawn):
    source, divisors, fixed, fraction, non_embedding = drawn
    count = ArchSpec.num_non_embedding_parameters if non_embedding else ArchSpec.num_parameters
    try:
        target = resolve_target(source, sizes=fixed, budget=fraction, non_embedding=non_embedding, divisors=divisors)
    except ConfigError:
        assume(False)
    limit = fraction * count(source)
    assert count(target) <= limit
    for key in ("hidden_size", "ffn_hidden_size"):
        size, largest = getattr(target, key), getattr(source, key)
        assert size == fixed.get(key, size)
        if key not in fixed:
            assert size == largest or size % divisors[key] == 0
    if "ffn_hidden_size" not in fixed and target.ffn_hidden_size < source.ffn_hidden_size:
        step = divisors["ffn_hidden_size"]
        more = min(source.ffn_hidden_size, target.ffn_hidden_size // step * step + step)
        assert count(dataclasses.replace(target, ffn_hidden_size=more)) > limit
    assert (target.num_layers, target.num_attention_heads) == (source.num_layers, source.num_attention_heads)


def test_budget_that_cannot_be_met_says_what_can():
    with pytest.raises(ConfigError, match=r"at least [\d,]+ parameters.*prune\.budget"):
        resolve_target(LLAMA_8B, sizes={"hidden_size": 4096}, budget=1e6, divisors=DIVISORS)


def test_listed_layers_decide_the_number_of_layers():
    assert resolve_target(LLAMA_8B, sizes={}, dropped_layers=tuple(range(15, 31))).num_layers == 16
    with pytest.raises(ConfigError, match=r"prune\.layers\.drop"):
        resolve_target(LLAMA_8B, sizes={"num_layers": 20}, dropped_layers=(1,))


@pytest.mark.parametrize(("wanted", "error", "key"), [
    ({"sizes": {"hidden_size": 64}, "ratios": {"hidden_size": 0.5}}, ConfigError, "prune.ratio.hidden_size"),
    ({"sizes": {}, "ratios": {"hidden_size": 1.5}}, ConfigError, "prune.ratio.hidden_size"),
    ({"sizes": {}, "ratios": {"hidden_size": float("nan")}}, ConfigError, "prune.ratio.hidden_size"),
    ({"sizes": {}, "budget": 9e9}, ConfigError, "above the source; expected at most 8,030,261,248"),
    ({"sizes": {}, "budget": -1.0}, ConfigError, "prune.budget"),
    ({"sizes": {"num_attention_heads": 30}}, ArchError, "prune.target.num_attention_heads"),
    ({"sizes": {"hidden_size": 5000}}, ArchError, "prune.target.hidden_size"),
    ({"sizes": {"hiden": 5}}, ConfigError, "prune.target.hiden"),
])
def test_what_cannot_be_is_refused_with_its_key(wanted, error, key):
    with pytest.raises(error) as caught:
        resolve_target(LLAMA_8B, **wanted)
    assert key in str(caught.value)
