"""Batches of samples as tensors, and the choice of samples to calibrate on. Shape letters: B samples, S sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_minitron.data.indexed import IndexedTokens
from nemo_minitron.data.samples import SampleSpec
from nemo_minitron.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples as whole sequences: not sharded over tensor, context or pipeline ranks.

    `labels[b, s]` is the token that follows `tokens[b, s]`; `loss_mask` is 1 where it counts and 0 on padding.
    """

    tokens: torch.Tensor  # [B, S] int64
    labels: torch.Tensor  # [B, S] int64
    position_ids: torch.Tensor  # [B, S] int64, 0 to S-1 in every row
    loss_mask: torch.Tensor  # [B, S] float32
    sample_ids: torch.Tensor  # [B] int64

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in fields.items()})


class TokenSamples:
    """The samples of one split: `spec` says how many there are, `batch` reads some of them."""

    def __init__(self, tokens: IndexedTokens, seq_length: int, *, vocab_size: int | None = None) -> None:
        """Read from `tokens`; with `vocab_size`, refuse tokens that the model has no embedding row for."""
        self.spec = SampleSpec(len(tokens), seq_length)
        self._tokens = tokens
        self._vocab_size = vocab_size

    def batch(self, sample_ids: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Read samples, in the given order. The partial last sample is padded with token 0 and mask 0.

        Raises:
            DataError: A token is not below `vocab_size`: the token files are another tokenizer's.
        """
        seq_length = self.spec.seq_length
        window = np.zeros((len(sample_ids), seq_length + 1), dtype=np.int64)
        loss_mask = np.zeros((len(sample_ids), seq_length), dtype=np.float32)
        for row, sample_id in enumerate(sample_ids):
            start, count = self.spec.token_range(int(sample_id))
            window[row, :count] = self._tokens.read(start, count)
            loss_mask[row, : count - 1] = 1
        if self._vocab_size is not None and window.size and window.max() >= self._vocab_size:
            raise DataError("the token files do not fit the model", expected=f"tokens below {self._vocab_size}",
                            found=str(window.max()), key="data.path or teacher.path")
        return Batch(
            tokens=torch.from_numpy(window[:, :-1].copy()),
            labels=torch.from_numpy(window[:, 1:].copy()),
            position_ids=torch.arange(seq_length).repeat(len(sample_ids), 1),
            loss_mask=torch.from_numpy(loss_mask),
            sample_ids=torch.tensor([int(sample_id) for sample_id in sample_ids], dtype=torch.int64),
        )


def calibration_ids(num_samples_available: int, num_wanted: int, seed: int) -> NDArray[np.int64]:
    """Ascending, distinct sample ids chosen uniformly at random: int64 `[num_wanted]`.

    Raises:
        DataError: Fewer samples are available than wanted.
    """
    if num_wanted > num_samples_available:
        raise DataError("too few calibration samples", expected=f"{num_wanted} samples",
                        found=f"{num_samples_available} in the calibration text", key="importance.num_samples")
    chosen = np.random.default_rng(seed).choice(num_samples_available, size=num_wanted, replace=False)
    return np.sort(chosen).astype(np.int64)
