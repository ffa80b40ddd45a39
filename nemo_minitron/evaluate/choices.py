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
    """All options of all questions in order, each with the leading token that documents have (bos, or eos).

    Context and continuation are encoded as one text. What is judged starts at the first token that is not the
    context's own, so a token across the boundary counts as the continuation's; spaces at the end of a context belong to
    its continuation, as tokenizers join them to the next word. Text that looks like a special token is text. Contexts
    lose tokens from the left where an option is longer than `max_length` + 1 tokens.

    Raises:
        DataError: a continuation has no tokens, or alone is too long; names the question, counted from 1.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    head = [] if start is None else [start]

    def encode(text: str) -> list[int]:
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(encoded["input_ids"])

    options = []
    for number, question in enumerate(questions, 1):
        for context, continuation in question.options:
            whole, alone = encode(context + continuation), encode(context.rstrip(" "))
            shared = next((place for place, pair in enumerate(zip(whole, alone, strict=False)) if pair[0] != pair[1]),
                          min(len(whole), len(alone)))
            count, longest = len(whole) - shared, min(max_length, len(head) + len(whole) - 1)
            if not 1 <= count <= longest:
                raise DataError(f"question {number} cannot be put to the model", key=KEY, found=f"{count} tokens",
                                expected=f"a continuation of at most {longest} tokens" if count
                                else f"a continuation with tokens in place of {continuation[:40]!r}")
            options.append(Option(tuple((head + whole)[-(max_length + 1):]), count))
    return options


def option_batch(options: Sequence[Option], size: int, length: int) -> Batch:
    """The options as rows of `length` predicted tokens, filled up to `size` rows; the mask is the continuation's.

    Rows are filled up on the right, where no token that counts can see it.
    """
    window = np.zeros((size, length + 1), np.int64)
    mask = np.zeros((size, length), np.float32)
    for row, option in enumerate(options):
        count = len(option.tokens)
        window[row, :count] = option.tokens
        mask[row, count - 1 - option.num_continuation : count - 1] = 1
    return Batch(tokens=torch.from_numpy(window[:, :-1].copy()), labels=torch.from_numpy(window[:, 1:].copy()),
                 position_ids=torch.arange(length).repeat(size, 1), loss_mask=torch.from_numpy(mask),
                 sample_ids=torch.arange(size))
