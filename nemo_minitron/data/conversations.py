"""Conversations out of JSON lines: `{"messages": [{"role": ..., "content": ...}, ...]}`, one a line. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.data import jsonl
from nemo_minitron.data.text import Document, text_files
from nemo_minitron.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
ANSWER = "assistant"
"""The role whose words a model is to say."""


def read_conversations(path: Path) -> list[Document]:
    """Every line of a file, or of every `*.jsonl` below a folder by relative path; blank lines are left out.

    A document's `id` is `file:line` (from 1), its text the messages as JSON; `messages_of` reads it back. Other keys of
    a line or a message are passed over.

    Raises:
        DataError: no such file, no conversation in it, or a line in which a conversation has no messages, a role that
            is missing or not of `ROLES`, a content that is no string, or an answer before any message of the user.
    """
    if not path.exists():
        raise DataError("no conversations", expected=f"a file or folder at {path}", found="nothing", key="data.path")
    files = {path.name: path} if path.is_file() else {
        name: file for name, file in text_files(path).items() if file.suffix == jsonl.SUFFIX}
    documents = [document for name, file in files.items() for document in _read_file(name, file)]
    if not documents:
        raise DataError("no conversations", expected=f"lines of JSON in {path}" if path.is_file()
                        else f"lines of JSON in *{jsonl.SUFFIX} files below {path}", key="data.path",
                        found="an empty file" if path.is_file() else f"{len(files)} such files with none")
    return documents


def messages_of(document: Document) -> list[dict[str, str]]:
    """The messages that `read_conversations` found: role and content each."""
    messages: list[dict[str, str]] = json.loads(document.text)
    return messages


def _read_file(name: str, file: Path) -> Iterator[Document]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"line {number} of {file}"
                text = json.dumps(_messages(line, where), ensure_ascii=False)
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise _bad("Unicode", f"half a surrogate pair (\\ud800 to \\udfff) in {where}") from None
                yield Document(f"{name}:{number}", text)


def _messages(line: bytes, where: str) -> list[dict[str, str]]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _bad("UTF-8", f"other bytes in {where}") from None
    except (ValueError, RecursionError) as error:
        raise _bad("a JSON object", f"{error} in {where}") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise _bad('{"messages": [{"role": ..., "content": ...}, ...]}', f"{_keys(record)} in {where}")
    read = [_message(message, number, where) for number, message in enumerate(messages, 1)]
    roles = [message["role"] for message in read]
    if ANSWER in roles and "user" not in roles[: roles.index(ANSWER)]:
        raise _bad("a message of the user before the first answer", f"none in {where}")
    return read


def _message(message: Any, number: int, where: str) -> dict[str, str]:
    place = f"in message {number} of {where}"
    if not isinstance(message, dict) or "role" not in message:
        raise _bad('a "role" in every message', f"{_keys(message)} {place}")
    if message["role"] not in ROLES:
        raise _bad(f"a role of {', '.join(ROLES)}", f"{message['role']!r} {place}")
    if not isinstance(message.get("content"), str):
        raise _bad('a string under "content" in every message', f"{_keys(message)} {place}")
    return {"role": message["role"], "content": message["content"]}


def _keys(record: Any) -> str:
    if not isinstance(record, dict):
        return f"a {type(record).__name__}"
    return f"{{{', '.join(f'{key}: {type(value).__name__}' for key, value in record.items())}}}"


def _bad(expected: str, found: str) -> DataError:
    return DataError("not a conversation", expected=expected, found=found, key="the file or data.path")
