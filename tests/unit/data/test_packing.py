import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.data.packing import cut_documents, one_each, pack, truncate_documents


def best_fit_decreasing(lengths, room):
    """One piece at a time, as the textbook has it: the room left in every sample."""
    left = []
    for size in sorted(lengths, reverse=True):
        fitting = [place for place, free in enumerate(left) if free >= size]
        if not fitting:
            left.append(room)
            fitting = [len(left) - 1]
        place = min(fitting, key=lambda place: left[place])
        left[place] -= size
    return sorted(left)


@given(st.integers(1, 30).flatmap(lambda room: st.tuples(
    st.just(room), st.lists(st.integers(1, room), max_size=60))))
def test_it_is_best_fit_decreasing(case):
    room, lengths = case
    packing = pack(np.array(lengths, dtype=np.int64), room)
    samples = [packing.pieces_of(sample) for sample in range(packing.num_samples)]
    assert sorted(piece for sample in samples for piece in sample.tolist()) == list(range(len(lengths)))
    assert sorted(room - sum(lengths[piece] for piece in sample) for sample in samples) == best_fit_decreasing(
        lengths, room)


def test_samples_and_their_pieces_are_in_the_order_of_the_text():
    packing = pack(np.array([3, 9, 7, 2, 1]), 10)
    assert [packing.pieces_of(sample).tolist() for sample in range(3)] == [[0, 2], [1, 4], [3]]
    assert [one_each(2).pieces_of(sample).tolist() for sample in range(2)] == [[0], [1]]


def test_many_documents_fill_their_samples():
    lengths = np.random.default_rng(0).integers(1, 1024, 200_000)
    packing = pack(lengths, 1024)
    assert lengths.sum() / (1024 * packing.num_samples) > 0.998


@pytest.mark.parametrize("seq_length", [1, 3, 4, 100])
def test_every_token_but_the_first_of_a_document_is_predicted_once(seq_length):
    offsets = np.array([0, 1, 1, 6, 8, 18])
    pieces = cut_documents(offsets, seq_length)
    labels = [label for start, length in zip(pieces.start, pieces.length, strict=True)
              for label in range(start + 1, start + length + 1)]
    assert labels == [2, 3, 4, 5, 7, *range(9, 18)]
    assert len(pieces) and pieces.length.min() >= 1 and pieces.length.max() <= seq_length


def test_of_a_long_document_the_start_can_be_kept_alone():
    pieces = truncate_documents(np.array([0, 1, 6, 8]), 3)
    assert pieces.start.tolist() == [1, 6] and pieces.length.tolist() == [3, 1]


def test_nothing_to_pack():
    assert pack(np.array([], dtype=np.int64), 8).num_samples == 0
    assert len(cut_documents(np.array([0]), 8)) == 0
