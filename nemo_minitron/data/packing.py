"""Documents packed whole into samples of one length. Numpy only.

A document of n tokens has n - 1 predictions: its inputs are all of its tokens but the last, its labels all but the
first. So no input stands for the end of one document with the start of another as its label, and samples of documents
put side by side have nothing to mask but the padding at their end. Attention is to be kept inside each document.

Which sample a document goes to is best-fit decreasing (D. S. Johnson, "Near-optimal bin packing algorithms", 1973;
for training texts arXiv:2404.10830): from the longest to the shortest, each into the fullest sample that has room. It
depends on the lengths alone.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """Parts of documents that are to stay in one piece: `length` predictions from token `start` of the stream on.

    Piece i reads the tokens `[start, start + length + 1)`.
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)

    def select(self, which: NDArray[np.bool_]) -> Pieces:
        """The pieces where `which` is true."""
        return Pieces(start=self.start[which], length=self.length[which])


def cut_documents(offsets: NDArray[np.int64], seq_length: int) -> Pieces:
    """Documents as pieces of at most `seq_length` predictions, in order; one token alone predicts nothing.

    `offsets`: where documents start in the stream, ascending `[num_documents + 1]`. Pieces of one document share a
    token, as samples of a stream do: each of its tokens but the first is the label of exactly one piece.
    """
    predictions = np.maximum(np.diff(offsets) - 1, 0)
    counts = -(-predictions // seq_length)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of its document, from 0
    start = np.repeat(offsets[:-1], counts) + nth * seq_length
    return Pieces(start=start, length=np.minimum(np.repeat(predictions, counts) - nth * seq_length, seq_length))


def truncate_documents(offsets: NDArray[np.int64], seq_length: int) -> Pieces:
    """The first `seq_length` predictions of each document, in order; one token alone predicts nothing."""
    predictions = np.diff(offsets) - 1
    kept = predictions > 0
    return Pieces(start=offsets[:-1][kept], length=np.minimum(predictions[kept], seq_length))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Sample k holds the pieces `order[starts[k] : starts[k + 1]]`."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    @property
    def num_samples(self) -> int:
        """How many there are."""
        return len(self.starts) - 1

    def pieces_of(self, sample: int) -> NDArray[np.int64]:
        """Numbers of the pieces of a sample, ascending."""
        return self.order[self.starts[sample] : self.starts[sample + 1]]


def one_each(num_pieces: int) -> Packing:
    """Every piece a sample of its own."""
    return Packing(order=np.arange(num_pieces), starts=np.arange(num_pieces + 1))


def pack(lengths: NDArray[np.int64], room: int) -> Packing:
    """Best-fit decreasing of pieces of `lengths` (1 to `room`) into samples of `room` predictions.

    Pieces of equal length are placed together, so the work grows with the number of different lengths. Samples are
    numbered by their first piece, and hold their pieces in order.
    """
    assert not len(lengths) or 1 <= lengths.min() <= lengths.max() <= room
    sample_of = np.empty(len(lengths), dtype=np.int64)
    open_samples: dict[int, list[NDArray[np.int64]]] = {}  # room left -> samples
    rooms: list[int] = []  # its keys, ascending
    num_samples = 0
    for size, group in _by_length(lengths):
        while len(group):
            place = bisect.bisect_left(rooms, size)
            if place < len(rooms):
                left = rooms.pop(place)
                samples = np.concatenate(open_samples.pop(left))
            else:
                left, samples = room, num_samples + np.arange(-(-len(group) // (room // size)))
                num_samples += len(samples)
            each = left // size  # the fullest with room is again the one that has just had a piece
            used = samples[: -(-len(group) // each)]
            taken = min(len(group), each * len(used))
            sample_of[group[:taken]] = np.repeat(used, each)[:taken]
            last = taken - each * (len(used) - 1)
            _put_back(open_samples, rooms, left - each * size, used[:-1])
            _put_back(open_samples, rooms, left - last * size, used[-1:])
            _put_back(open_samples, rooms, left, samples[len(used):])
            group = group[taken:]
    _, first, numbers = np.unique(sample_of, return_index=True, return_inverse=True)
    rank = np.empty(num_samples, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(num_samples)
    sample_of = rank[numbers]
    order = np.argsort(sample_of, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(sample_of, minlength=num_samples))))
    return Packing(order=order, starts=starts)


def _by_length(lengths: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(length, pieces that have it, in order), from the longest to the shortest."""
    order = np.argsort(-lengths, kind="stable")
    borders = np.flatnonzero(np.diff(lengths[order])) + 1
    for group in np.split(order, borders) if len(order) else []:
        yield int(lengths[group[0]]), group


def _put_back(open_samples: dict[int, list[NDArray[np.int64]]], rooms: list[int], left: int,
              samples: NDArray[np.int64]) -> None:
    if left and len(samples):
        if left not in open_samples:
            bisect.insort(rooms, left)
        open_samples.setdefault(left, []).append(samples)
