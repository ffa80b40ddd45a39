"""Which tokens make up a sample, and the order in which training sees samples. Numpy only.

The order is keyed by the position alone, so it is the same at every data-parallel degree and micro-batch size
and after a resume at any step: nothing has to be saved but the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """A stream of `num_tokens` tokens cut into samples of `seq_length` predicted tokens.

    Sample k holds the tokens `[k*S, k*S + S + 1)`: inputs are all but the last, labels all but the first. Every
    token of the stream but the first is thus the label of exactly one sample. The last sample may be partial:
    evaluation pads and masks it, training drops it.
    """

    num_tokens: int
    seq_length: int

    @property
    def num_labels(self) -> int:
        """Predicted tokens in the whole stream: all but the first."""
        return max(self.num_tokens - 1, 0)

    @property
    def num_evaluation_samples(self) -> int:
        """All samples, with the partial one."""
        return -(-self.num_labels // self.seq_length)

    @property
    def num_training_samples(self) -> int:
        """Full samples only."""
        return self.num_labels // self.seq_length

    def check_training(self) -> SampleSpec:
        """Return self, or raise `DataError` when there is not one full sample."""
        if not self.num_training_samples:
            raise DataError("too little text", expected=f"at least {self.seq_length + 1} tokens",
                            found=f"{self.num_tokens}", key="data.path or data.seq_length")
        return self

    def token_range(self, sample_id: int) -> tuple[int, int]:
        """First token and number of tokens of a sample: S + 1, or fewer (at least 2) in the partial one."""
        assert 0 <= sample_id < self.num_evaluation_samples, (sample_id, self)
        start = sample_id * self.seq_length
        return start, min(self.seq_length + 1, self.num_tokens - start)


def sample_order(position: int, num_samples: int, seed: int) -> int:
    """The sample at `position` of the endless training order, in which every epoch is a new permutation."""
    epoch, index = divmod(position, num_samples)
    return int(_epochs(num_samples, seed)(epoch)[index])


@lru_cache(maxsize=256)  # the sources of a blend are read in turn
def _epochs(num_samples: int, seed: int) -> Callable[[int], NDArray[np.int64]]:
    """Epoch -> permutation, of which the last few are kept: a global batch may straddle two."""
    return lru_cache(maxsize=4)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(num_samples))


def positions_for(step: int, *, global_batch_size: int, micro_batch_size: int, dp_rank: int,
                  dp_size: int) -> list[list[int]]:
    """The positions that a replica trains on in `step` (from 0), one list of `micro_batch_size` per micro-batch.

    The replicas' positions are disjoint, and together they are `[step * G, (step + 1) * G)` with G the global
    batch size; micro-batch m of all replicas is a contiguous part of that, as in Megatron's samplers.

    Raises:
        ConfigError: The global batch is not a multiple of `micro_batch_size * dp_size`.
    """
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
        raise ConfigError(
            "batch sizes do not divide",
            expected="train.global_batch_size to be a multiple of train.micro_batch_size x data-parallel degree",
            found=f"{global_batch_size} and {micro_batch_size} x {dp_size}",
            key="train.global_batch_size, train.micro_batch_size or the parallel layout",
        )
    first = step * global_batch_size + dp_rank * micro_batch_size
    stride = micro_batch_size * dp_size
    return [list(range(start, start + micro_batch_size)) for start in range(first, first + global_batch_size, stride)]
