"""A file of prompts: JSON lines, each with `prompt` (text) or `messages` (a chat).

    {"prompt": "def factorial(n):", ...}
    {"messages": [{"role": "system", "content": "..."}, {"role": "user", "content": "..."}], ...}

Other fields are kept in the answers, which are chat data (data/conversations.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "generate.prompts"
_ROLES = ("system", "user", "assistant", "tool")


def read_prompts(path: str | None) -> list[dict[str, Any]]:
    """The rows of the file.

    Raises:
        DataError: no file, no JSON, or a row of another form; names the line, from 1.
    """
    expected = "JSON lines with prompt or messages"
    try:
        text = Path(path).read_text(encoding="utf-8") if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("the prompts cannot be read", expected=f"{expected} in {path}", found=str(error),
                        key=KEY) from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"wrong form in {where}", expected=expected, found=str(error), key=KEY) from None
        _check(row, where)
        rows.append(row)
    if not rows:
        raise DataError("no prompts", expected=expected, found=str(path or "null"), key=KEY)
    return rows


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"wrong form in {where}", expected="either prompt or messages", found=found, key=KEY)
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise DataError(f"wrong form in {where}", expected="prompt to be text", found=repr(row["prompt"])[:60],
                            key=KEY)
        return
    messages = row["messages"]
    for message in messages if isinstance(messages, list) and messages else [None]:
        if not isinstance(message, dict) or message.get("role") not in _ROLES \
                or not isinstance(message.get("content"), str):
            raise DataError(f"wrong form in {where}", found=repr(message)[:60], key=KEY,
                            expected=f"messages with content and a role of {', '.join(_ROLES)}")
    roles = [message["role"] for message in messages]
    if "user" not in roles[: roles.index("assistant") if "assistant" in roles else None]:
        raise DataError(f"wrong form in {where}", expected="a message of the user before the first answer",
                        found=", ".join(roles), key=KEY)
    if roles[-1] == "assistant":
        raise DataError(f"wrong form in {where}", expected="a chat that waits for an answer",
                        found="one that ends with the assistant's", key=KEY)


def encode_prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a row: a text as documents are encoded (bos, else eos, in front), a chat by the tokenizer's template.

    Raises:
        DataError: a chat, and a tokenizer without a template or one whose template refuses it.
    """
    if "prompt" in row:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        encoded = tokenizer(row["prompt"], add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [*([] if start is None else [start]), *encoded["input_ids"]]
    try:
        return list(tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=True))
    except Exception as error:  # transformers' ValueError where there is no template, jinja2's where it refuses
        raise DataError("a chat cannot be put to the model", expected="a tokenizer with a chat template that takes it",
                        found=str(error)[:200], key=KEY) from None


def answered(row: dict[str, Any], answer: str, *, finished: bool) -> dict[str, Any]:
    """The row with the model's `answer`; `finished` is false where it was cut off at the most tokens allowed.

    `messages` is the chat with the answer as its last message, or a text and its answer as a chat of two messages: the
    file is chat data as `data.kind=chat` reads it.
    """
    asked = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    return {**row, "answer": answer, "finished": finished,
            "messages": [*asked, {"role": "assistant", "content": answer}]}
