"""The one place where a model is given a batch: training, teacher, scoring and evaluation all call it."""

from __future__ import annotations

import torch

from nemo_minitron.data.batch import Batch
from nemo_minitron.model.attention import document_borders, document_mask
from nemo_minitron.model.build import transformer_engine_is_available


def forward_batch(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Forward of one micro-batch on this rank's stage: the hidden state handed on, `[S, B, H]`.

    `[S/tp, B, H]` with sequence parallelism. `model` is a `HiddenStateGPT`, or a wrapper of NeMo or Megatron around it.
    Every stage reads the documents of the batch itself; they do not go through the pipeline.
    """
    keeps_apart = None
    if batch.document_ids is not None:
        keeps_apart = document_borders(batch.document_ids) if transformer_engine_is_available() \
            else document_mask(batch.document_ids, next(model.parameters()).dtype)
    hidden: torch.Tensor = model(batch.tokens, batch.position_ids, keeps_apart)
    return hidden
