"""Documents out of JSON lines: one object a line, the text under a named key. A byte range of a file at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.errors import DataError

SUFFIX = ".jsonl"


def read_lines(path: Path, key: str, *, start: int = 0, end: int | None = None) -> Iterator[str]:
    """The text under `key` of every line that starts in bytes `[start, end)`, in order; blank lines are left out.

    Consecutive ranges give every line once, wherever they are cut. One line is held in memory at a time.

    Raises:
        DataError: a line that is no JSON object or not UTF-8, has no such key, or no string of Unicode under it.
    """
    with open(path, "rb") as file:
        position = start
        if start:
            file.seek(start - 1)
            position += len(file.readline()) - 1  # the rest of a line that starts before; a newline just before: none
        while end is None or position < end:
            line = file.readline()
            if not line:
                return
            if line.strip():
                yield _text(path, position, line, key)
            position += len(line)


def _text(path: Path, position: int, line: bytes, key: str) -> str:
    expected = f'a JSON object with a string under "{key}" in {path}'
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError("not text", expected=f"UTF-8 in {path}", found=f"other bytes in line {_number(path, position)}",
                        key="the file") from None
    except (ValueError, RecursionError) as error:
        raise DataError("malformed JSON line", expected=expected, key="the file",
                        found=f"in line {_number(path, position)}: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        raise DataError("no text in a JSON line", expected=expected, key="json_key",
                        found=f"{_what_is_there(record, key)} in line {_number(path, position)}")
    text = str(record[key])
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("not text", expected=f"Unicode in {path}", key="the file",
                        found=f"half a surrogate pair (\\ud800 to \\udfff) in line {_number(path, position)}") from None
    return text


def _what_is_there(record: Any, key: str) -> str:
    if not isinstance(record, dict):
        return "no object"
    if key in record:
        return f"a {type(record[key]).__name__} there"
    return f"only {', '.join(map(repr, record)) or 'an empty object'}"


def _number(path: Path, position: int) -> int:
    """The number, from 1, of the line that starts at byte `position`."""
    number = 1
    with open(path, "rb") as file:
        while position > 0 and (block := file.read(min(position, 1 << 20))):
            number += block.count(b"\n")
            position -= len(block)
    return number
