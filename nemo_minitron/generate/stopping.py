"""When a continuation is complete: at the end-of-sequence token, or at one of several strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopAt:
    """Called with a continuation's tokens so far, after each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.strings = tuple(string for string in strings if string)
        # a token is a byte at least, so no string is spread over more tokens than it has bytes
        self.window = max((len(string.encode()) for string in self.strings), default=0) + 1

    def __call__(self, tokens: list[int]) -> bool:
        """Whether the newest token ends it."""
        if tokens[-1] == self.tokenizer.eos_token_id:
            return True
        if not self.strings:
            return False
        tail = self.tokenizer.decode(tokens[-self.window :], clean_up_tokenization_spaces=False)
        return any(string in tail for string in self.strings)

    def cut(self, tokens: Sequence[int]) -> str:
        """The text of a continuation, up to the first of the strings and without special tokens."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for string in self.strings:
            text = text.split(string)[0]
        return str(text)
