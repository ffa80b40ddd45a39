"""Samples that keep documents apart: several in one, or one each. Shape letters: B samples, S sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_minitron.data.batch import Batch, calibration_ids, check_vocabulary
from nemo_minitron.data.indexed import IndexedTokens
from nemo_minitron.data.packing import Pieces, cut_documents, one_each, pack, truncate_documents
from nemo_minitron.data.samples import sample_order
from nemo_minitron.errors import DataError

_PIECES_A_LOOK = 4096


class DocumentSamples:
    """The samples of one split, each of whole documents, or of parts of those that are longer than a sample.

    Without `answers`, every token but the first of each document is predicted once. With `answers`, documents are
    conversations: only their answers' tokens are predicted, what is longer than a sample is cut off at its end, and a
    conversation without a predicted token is left out. `num_truncated` and `num_dropped` count these.
    """

    def __init__(self, tokens: IndexedTokens, seq_length: int, *, packed: bool = True, vocab_size: int | None = None,
                 answers: IndexedTokens | None = None) -> None:
        """Put the documents of `tokens` into samples of `seq_length` predictions, or with not `packed` one into each.

        `answers` is a stream as long as `tokens`: 1 for the tokens that a model is to say. With `vocab_size`, refuse
        tokens that the model has no embedding row for.
        """
        self._tokens, self._answers, self._vocab_size = tokens, answers, vocab_size
        self.seq_length = seq_length
        self.num_truncated = self.num_dropped = 0
        offsets = tokens.document_offsets()
        if answers is None:
            self._pieces = cut_documents(offsets, seq_length)
        else:
            assert len(answers) == len(tokens)
            self._pieces = self._with_answers(truncate_documents(offsets, seq_length), answers)
            self.num_truncated = int((np.diff(offsets) - 1 > seq_length).sum())
            self.num_dropped = len(offsets) - 1 - len(self._pieces)
        self._packing = pack(self._pieces.length, seq_length) if packed else one_each(len(self._pieces))

    @staticmethod
    def _with_answers(pieces: Pieces, answers: IndexedTokens) -> Pieces:
        """The pieces that have an answer's token among their labels."""
        found = np.zeros(len(pieces), dtype=np.bool_)
        for first in range(0, len(pieces), _PIECES_A_LOOK):
            rows = slice(first, first + _PIECES_A_LOOK)
            begin, ends = int(pieces.start[rows][0]), pieces.start[rows] + pieces.length[rows] + 1
            counts = np.concatenate(([0], np.cumsum(answers.read(begin, int(ends.max()) - begin))))
            found[rows] = counts[ends - begin] > counts[pieces.start[rows] + 1 - begin]
        return pieces.select(found)

    @property
    def num_evaluation_samples(self) -> int:
        """All samples."""
        return self._packing.num_samples

    @property
    def fill(self) -> float:
        """Share of the samples' places that hold a token of a document."""
        return float(self._pieces.length.sum()) / max(self.seq_length * self._packing.num_samples, 1)

    def check_training(self) -> None:
        """Raise `DataError` when there is no sample."""
        if not self._packing.num_samples:
            raise DataError("too little text", found="none", key="data.path or data.seq_length",
                            expected="a document of two tokens" if self._answers is None
                            else f"a conversation with an answer in its first {self.seq_length + 1} tokens")

    def training_id(self, position: int, seed: int) -> int:
        """The sample at `position` of the training order."""
        return sample_order(position, self._packing.num_samples, seed)

    def calibration_ids(self, num_wanted: int, seed: int) -> NDArray[np.int64]:
        """Of all samples, `num_wanted` at random."""
        return calibration_ids(self._packing.num_samples, num_wanted, seed)

    def batch(self, sample_ids: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Read samples, in the given order; places that no document fills have token 0, mask 0 and document 0.

        Raises:
            DataError: A token is not below `vocab_size`: the token files are another tokenizer's.
        """
        B, S = len(sample_ids), self.seq_length
        columns = np.zeros((4, B, S), dtype=np.int64)
        tokens, labels, position_ids, document_ids = columns
        loss_mask = np.zeros((B, S), dtype=np.float32)
        for row, sample_id in enumerate(sample_ids):
            assert 0 <= sample_id < self._packing.num_samples, sample_id
            end = 0
            for number, piece in enumerate(self._packing.pieces_of(int(sample_id)), 1):
                begin, count = int(self._pieces.start[piece]), int(self._pieces.length[piece])
                place, end = slice(end, end + count), end + count
                read = self._tokens.read(begin, count + 1)
                tokens[row, place], labels[row, place] = read[:-1], read[1:]
                loss_mask[row, place] = 1 if self._answers is None else self._answers.read(begin + 1, count)
                position_ids[row, place], document_ids[row, place] = np.arange(count), number
            position_ids[row, end:] = np.arange(S - end)
        check_vocabulary(columns[:2], self._vocab_size)
        return Batch(
            tokens=torch.from_numpy(tokens), labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(position_ids), document_ids=torch.from_numpy(document_ids),
            loss_mask=torch.from_numpy(loss_mask),
            sample_ids=torch.tensor([int(sample_id) for sample_id in sample_ids], dtype=torch.int64),
        )
