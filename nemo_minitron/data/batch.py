"""Batches of samples as tensors, and the choice of samples to calibrate on. Shape letters: B samples, S sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_minitron.data.blend import Mixture, apportion
from nemo_minitron.data.indexed import IndexedTokens
from nemo_minitron.data.samples import SampleSpec, sample_order
from nemo_minitron.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples as whole sequences: not sharded over tensor, context or pipeline ranks.

    `labels[b, s]` is the token that follows `tokens[b, s]`; `loss_mask` is 1 where it counts and 0 on padding.
    `document_ids` is None where tokens attend to all before them. Otherwise they attend inside their document only:
    documents of a row are numbered from 1 on, 0 is padding, and positions start again at each.
    """

    tokens: torch.Tensor  # [B, S] int64
    labels: torch.Tensor  # [B, S] int64
    position_ids: torch.Tensor  # [B, S] int64, from 0 on in every document
    loss_mask: torch.Tensor  # [B, S] float32
    sample_ids: torch.Tensor  # [B] int64
    document_ids: torch.Tensor | None = None  # [B, S] int64, ascending in every row but for the padding at its end

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def row(self, number: int) -> Batch:
        """One sample of it."""
        return self._map(lambda tensor: tensor[number : number + 1])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: None if tensor is None else change(tensor) for name, tensor in fields.items()}
        return Batch(**changed)

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """The samples of several batches, which all have `document_ids` or all have none."""
        columns: dict[str, list[Any]] = {field.name: [getattr(batch, field.name) for batch in batches]
                                         for field in dataclasses.fields(Batch)}
        joined: dict[str, Any] = {name: None if parts[0] is None else torch.cat(parts)
                                  for name, parts in columns.items()}
        return Batch(**joined)


class Samples(Protocol):
    """The samples of one split, of one source or several."""

    @property
    def seq_length(self) -> int:
        """Predicted tokens a sample."""

    @property
    def num_evaluation_samples(self) -> int:
        """All of them; ids are below it."""

    def batch(self, sample_ids: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Read samples, in the given order."""

    def check_training(self) -> None:
        """Raise `DataError` where there is nothing to train on."""

    def training_id(self, position: int, seed: int) -> int:
        """The sample at `position` of the endless training order."""

    def calibration_ids(self, num_wanted: int, seed: int) -> NDArray[np.int64]:
        """Ascending, distinct ids of full samples, int64 `[num_wanted]`; `DataError` where there are fewer."""


class TokenSamples:
    """The samples of one split: `spec` says how many there are, `batch` reads some of them."""

    def __init__(self, tokens: IndexedTokens, seq_length: int, *, vocab_size: int | None = None) -> None:
        """Read from `tokens`; with `vocab_size`, refuse tokens that the model has no embedding row for."""
        self.spec = SampleSpec(len(tokens), seq_length)
        self._tokens = tokens
        self._vocab_size = vocab_size

    @property
    def seq_length(self) -> int:
        """Predicted tokens a sample."""
        return self.spec.seq_length

    @property
    def num_evaluation_samples(self) -> int:
        """All samples, with the partial one."""
        return self.spec.num_evaluation_samples

    @property
    def num_training_samples(self) -> int:
        """Full samples only."""
        return self.spec.num_training_samples

    def check_training(self) -> None:
        """Raise `DataError` when there is not one full sample."""
        self.spec.check_training()

    def training_id(self, position: int, seed: int) -> int:
        """The sample at `position` of the training order."""
        return sample_order(position, self.num_training_samples, seed)

    def calibration_ids(self, num_wanted: int, seed: int) -> NDArray[np.int64]:
        """Of the full samples, `num_wanted` at random."""
        return calibration_ids(self.num_training_samples, num_wanted, seed)

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
        check_vocabulary(window, self._vocab_size)
        return Batch(
            tokens=torch.from_numpy(window[:, :-1].copy()),
            labels=torch.from_numpy(window[:, 1:].copy()),
            position_ids=torch.arange(seq_length).repeat(len(sample_ids), 1),
            loss_mask=torch.from_numpy(loss_mask),
            sample_ids=torch.tensor([int(sample_id) for sample_id in sample_ids], dtype=torch.int64),
        )


class BlendedSamples:
    """The samples of several sources, one after another by id; training and calibration take them by weight."""

    def __init__(self, sources: Sequence[Samples], weights: Sequence[float]) -> None:
        """`sources` and their weights, of the same length; raises `ConfigError` for weights that are none."""
        assert len(sources) == len(weights) and sources
        self.sources = list(sources)
        self.mixture = Mixture(weights)
        self._starts = np.cumsum([0, *(source.num_evaluation_samples for source in sources)])
        self.seq_length = sources[0].seq_length
        self.num_evaluation_samples = int(self._starts[-1])

    def batch(self, sample_ids: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Read samples of any sources, in the given order; `sample_ids` of the batch are the blend's."""
        rows = []
        for sample_id in sample_ids:
            number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
            rows.append(self.sources[number].batch([int(sample_id - self._starts[number])]))
        ids = torch.tensor([int(sample_id) for sample_id in sample_ids], dtype=torch.int64)
        return dataclasses.replace(Batch.join(rows), sample_ids=ids)

    def check_training(self) -> None:
        """Raise `DataError` where a source has not one full sample."""
        for source in self.sources:
            source.check_training()

    def training_id(self, position: int, seed: int) -> int:
        """The sample at `position`: the mixture's source, and inside it that source's own order."""
        number, nth = self.mixture.source_of(position)
        return int(self._starts[number]) + self.sources[number].training_id(nth, seed)

    def calibration_ids(self, num_wanted: int, seed: int) -> NDArray[np.int64]:
        """By weight, largest remainders first; `DataError` where a source has too few."""
        counts = apportion(self.mixture.weights, num_wanted)
        chosen = [source.calibration_ids(count, seed) + start
                  for source, count, start in zip(self.sources, counts, self._starts, strict=False)]
        return np.concatenate(chosen)


def check_vocabulary(tokens: NDArray[np.int64], vocab_size: int | None) -> None:
    """Raise `DataError` where a token is not below `vocab_size`: the token files are another tokenizer's."""
    if vocab_size is not None and tokens.size and tokens.max() >= vocab_size:
        raise DataError("the token files do not fit the model", expected=f"tokens below {vocab_size}",
                        found=str(tokens.max()), key="data.path or teacher.path")


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
