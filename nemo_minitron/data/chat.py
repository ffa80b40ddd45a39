"""Conversations -> tokens and a mask of the answers, by the tokenizer's chat template.

Where the template marks the assistant's words with `{% generation %}`, these are the answers. Otherwise an answer is
what the conversation up to it has and the prompt for it has not: the words, and whatever the template ends them with
(a special token, say), which a model must learn to say as well. A token counts where its first character does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.data.conversations import ANSWER
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"
"""Where `transformers` looks for a template beside a tokenizer."""
_KEY = "data.chat_template"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_template(tokenizer: PreTrainedTokenizerBase, file: Path | None) -> str:
    """The template in `file`, or where None the tokenizer's own.

    Raises:
        DataError: there is none, the file is no text, or the tokenizer cannot tell where its tokens come from.
    """
    if not tokenizer.is_fast:
        raise DataError("the tokenizer cannot mark answers", expected="a fast one (tokenizer.json)", key="teacher.path",
                        found=type(tokenizer).__name__)
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("no chat template", expected=f"a Jinja template in {file}", found=str(error),
                            key=_KEY) from None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # none, or several without a default
        raise DataError("the tokenizer has no chat template", key=_KEY, found="none",
                        expected=f"{TEMPLATE_FILE} beside it, or a file of your own") from None


def encode_conversation(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]],
                        name: str) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Tokens of a conversation, int32 `[n]`, and 1 for those of its answers, uint8 `[n]`. Nothing is truncated.

    As in `transformers`, what spells a special token in a message is read as one.

    Raises:
        DataError: the template does not render this conversation (`name`), its text has no tokens, or the answers
            cannot be told apart in it.
    """
    if _MARKS.search(template):
        encoded: Any = _render(tokenizer, template, messages, name, tokenize=True, return_dict=True,
                               return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False})
        ids, answers = encoded["input_ids"], encoded["assistant_masks"]
    else:
        whole = str(_render(tokenizer, template, messages, name))
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, starts = encoded["input_ids"], np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
        answers = np.zeros(len(ids), dtype=np.uint8)
        for begin, end in _answer_spans(tokenizer, template, messages, name, whole):
            answers[(begin <= starts) & (starts < end)] = 1
    if not len(ids):
        raise DataError("a conversation without tokens", expected="text from the chat template", key=_KEY,
                        found=f"none for {name}")
    return np.array(ids, dtype=np.int32), np.array(answers, dtype=np.uint8)


def _answer_spans(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]], name: str,
                  whole: str) -> list[tuple[int, int]]:
    """First and one past the last character of each answer in the rendered conversation."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != ANSWER:
            continue
        before = _render(tokenizer, template, messages[:number], name, add_generation_prompt=True)
        with_it = _render(tokenizer, template, messages[: number + 1], name)
        if not (with_it.startswith(before) and whole.startswith(with_it)):
            raise DataError("answers cannot be told apart", key=_KEY, found=f"none for message {number + 1} of {name}",
                            expected="a template that writes the start of a conversation as it starts the whole, or "
                                     "marks answers with {% generation %}")
        spans.append((len(before), len(with_it)))
    return spans


def _render(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]], name: str,
            **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, **{"tokenize": False, **options})
    except Exception as error:  # a template can raise anything, and `transformers` raises in its own words too
        raise DataError("the chat template does not render a conversation", key=_KEY,
                        expected=f"a template for messages such as those of {name}",
                        found=f"{type(error).__name__}: {error}") from None
