import math

import pytest

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Candidate
from nemo_minitron.search.ranking import (
    as_dict,
    best_after_pruning,
    candidate_name,
    ranked,
    rung_steps,
    safe_step,
    stability,
    survivors,
    trained_steps,
)

ARCH = ArchSpec(family="llama", num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4,
                num_query_groups=2, head_dim=16, vocab_size=300, max_position_embeddings=64)


def candidate(name, pruned_loss, *losses):
    return Candidate(name=name, arch=ARCH, sizes={}, pruned_loss=pruned_loss,
                     curve=tuple((10 * (i + 1), 1000 * (i + 1), loss) for i, loss in enumerate(losses)))


def test_the_name_tells_the_sizes():
    assert candidate_name(ARCH) == "l4-h32-f64-a4-g2"


@pytest.mark.parametrize(("steps", "rungs", "keep", "expected"), [
    (40, 1, 0.5, (40,)), (40, 3, 0.5, (10, 20, 40)), (27, 3, 1 / 3, (3, 9, 27)), (2, 4, 0.5, (1, 2)),
    (8, 2, 1.0, (8,)),
])
def test_rungs_end_with_all_steps(steps, rungs, keep, expected):
    assert rung_steps(steps, rungs=rungs, keep=keep) == expected


@pytest.mark.parametrize(("count", "steps", "rungs", "keep", "expected"), [
    (9, 40, 1, 0.5, (360, 9)), (9, 40, 3, 0.5, (9 * 10 + 5 * 10 + 3 * 20, 3)), (9, 27, 3, 1 / 3, (27 + 18 + 18, 1)),
    (4, 8, 2, 0.5, (4 * 4 + 2 * 4, 2)), (1, 8, 2, 0.5, (8, 1)),
])
def test_steps_that_halving_spends(count, steps, rungs, keep, expected):
    ends = rung_steps(steps, rungs=rungs, keep=keep)
    assert trained_steps(count, ends, keep) == expected
    left, counted = list(range(count)), 0
    for rung, end in enumerate(ends):  # the same, by going through the rungs as the stage does
        counted += len(left) * (end - (ends[rung - 1] if rung else 0))
        left = left if end == ends[-1] else [left[i] for i in survivors([float(one) for one in left], keep)]
    assert (counted, len(left)) == expected


@pytest.mark.parametrize(("losses", "keep", "expected"), [
    ([3.0, 1.0, 2.0, 4.0], 0.5, [1, 2]), ([3.0, 1.0, 2.0], 0.5, [1, 2]), ([1.0, 1.0], 0.5, [0]), ([2.0], 0.1, [0]),
    ([math.nan, 5.0, math.inf], 0.3, [1]),
])
def test_survivors_are_the_best_in_their_order(losses, keep, expected):
    assert survivors(losses, keep) == expected


def test_the_longest_trained_come_first_then_the_lowest_loss():
    left = candidate("left", 1.0, 0.5)
    a, b, broken = candidate("a", 3.0, 2.0, 1.5), candidate("b", 2.0, 1.9, 1.6), candidate("x", 9.0, 1.0, math.nan)
    assert [one.name for one in ranked([left, broken, b, a])] == ["a", "b", "x", "left"]
    assert best_after_pruning([a, b, left]).name == "left"


def test_agreement_with_the_end_over_the_looks():
    """Ranks 1 2 3 at the end; 3 2 1 after pruning (correlation -1), 2 1 3 at the first look (1/2), then equal."""
    found = stability([candidate("a", 9.0, 5.0, 1.0, 1.0), candidate("b", 8.0, 4.0, 2.0, 2.0),
                       candidate("c", 7.0, 6.0, 3.0, 3.0), candidate("left", 1.0, 1.0)])
    assert [row["step"] for row in found] == [0, 10, 20, 30]
    assert [row["spearman"] for row in found] == pytest.approx([-1.0, 0.5, 1.0, 1.0])
    assert [row["same_best"] for row in found] == [False, False, True, True]
    assert safe_step(found) == 20


def test_one_candidate_has_no_correlation():
    assert [row["spearman"] for row in stability([candidate("a", 2.0, 1.0)])] == [None, None]
    assert safe_step([]) is None


def test_plain_data():
    found = as_dict(candidate("a", 2.0, 1.0))
    assert (found["step"], found["loss"], found["num_parameters"]) == (10, 1.0, ARCH.num_parameters())
    assert found["arch"] == ARCH.to_dict()
