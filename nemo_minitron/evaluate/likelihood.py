"""Log-likelihood of the unmasked tokens of each row, on the last stage of a live model."""

from __future__ import annotations

import torch

from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.terms import METERS, loss_terms
from nemo_minitron.model.build import HiddenStateGPT


def row_nats(model: HiddenStateGPT, hidden: torch.Tensor, batch: Batch, *, chunk_tokens: int = 256) -> torch.Tensor:
    """Minus the log-likelihood of each row's unmasked tokens, nats, summed over them: fp64 `[B]`.

    `hidden` is the final hidden state `[S, B, H]` (`[S/tp, B, H]` with sequence parallelism); every TP rank of the last
    stage must call this, and each gets the result.
    """
    nats = []
    for row in range(hidden.size(1)):
        terms = loss_terms(model, hidden[:, row : row + 1], batch.row(row), chunk_tokens=chunk_tokens)
        nats.append(terms.sums[METERS.index("ce")])
    return torch.stack(nats)
