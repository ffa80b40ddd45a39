"""Questions of `questions` as tokens and batches for a live model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_minitron.data.batch import Batch
from nemo_minitron.errors import DataError
from nemo_minitron.evaluate.questions import KEY, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Option:
    """One option in tokens; the last `num_continuation` of them are judged."""

    tokens: tuple[int, ...]
    num_continuation: int


def encode_options(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase,
                   max_length: int) -> list[Option]:
    """All options of all questions in order.

    Spaces at the end of a context belong to its continuation, as tokenizers join them to the next word. Contexts
    lose tokens from the left where an option is longer than `max_length` + 1 tokens.

    Raises:
        DataError: a continuation alone is too long.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    head = [] if start is None else [start]
    options = []
    for context, continuation in (option for question in questions for option in question.options):
        stripped = context.rstrip(" ")
        whole = tokenizer.encode(context + continuation, add_special_tokens=False)
        num_context = len(tokenizer.encode(stripped, add_special_tokens=False)) if stripped else 0
        num_continuation = max(1, len(whole) - num_context)
        tokens = head + whole
        if num_continuation > min(max_length, len(tokens) - 1):
            raise DataError("a question does not fit the model", key=KEY, found=f"{num_continuation} tokens",
                            expected=f"continuations of 1 to {min(max_length, len(tokens) - 1)} tokens")
        options.append(Option(tuple(tokens[-(max_length + 1):]), num_continuation))
    return options


def option_batch(options: Sequence[Option], size: int, length: int) -> Batch:
    """The options as rows of `length` predicted tokens, filled up to `size` rows; the mask is the continuation's."""
    window = np.zeros((size, length + 1), np.int64)
    mask = np.zeros((size, length), np.float32)
    for row, option in enumerate(options):
        count = len(option.tokens)
        window[row, :count] = option.tokens
        mask[row, count - 1 - option.num_continuation : count - 1] = 1
    return Batch(tokens=torch.from_numpy(window[:, :-1].copy()), labels=torch.from_numpy(window[:, 1:].copy()),
                 position_ids=torch.arange(length).repeat(size, 1), loss_mask=torch.from_numpy(mask),
                 sample_ids=torch.arange(size))
