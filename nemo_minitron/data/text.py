"""Text of the user's own: documents from a file or a folder, and their split into train, calibration, held-out.

All text is held in memory. It does not tokenize: `prepare` does.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.data import jsonl
from nemo_minitron.errors import ConfigError, DataError

SUFFIXES = (".txt", ".md", ".py", jsonl.SUFFIX)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. `id` is the file's path relative to the folder, with `#i` added for the i-th of several in a file."""

    id: str
    text: str


def read_documents(path: Path, *, separator: str | None = None, json_key: str = "text") -> list[Document]:
    """Read a file (of any suffix) or every `*.txt`, `*.md`, `*.py` and `*.jsonl` below a folder, by relative path.

    Each line of a `*.jsonl` file is a document, the string under `json_key`. Another file is one, or several where
    `separator` (such as "<|endoftext|>") splits it; then whitespace around each is stripped. Documents of nothing but
    whitespace and hidden files and folders are left out.

    Raises:
        DataError: `path` does not exist, has no text files or only whitespace, or a file is not UTF-8 text.
    """
    if not path.exists():
        raise DataError("no text", expected=f"a file or folder at {path}", found="nothing", key="data.path")
    files = {path.name: path} if path.is_file() else text_files(path)
    if not files:
        raise DataError("no text", expected=f"{', '.join('*' + suffix for suffix in SUFFIXES)} files below {path}",
                        found="none", key="data.path")
    documents = []
    for name, file in files.items():
        if file.suffix == jsonl.SUFFIX:
            lines = enumerate(jsonl.read_lines(file, json_key))
            documents += [Document(f"{name}#{i}", line) for i, line in lines if line.strip()]
            continue
        documents += [Document(f"{name}#{i}" if separator else name, piece)
                      for i, piece in enumerate(read_pieces(file, separator)) if piece.strip()]
    if not documents:
        raise DataError("no text", expected=f"text in {path}", found="only whitespace", key="data.path")
    return documents


def split_documents(documents: Sequence[Document], *, num_heldout: int | None = None, heldout_fraction: float = 0.02,
                    calibration_fraction: float = 0.1) -> dict[str, list[Document]]:
    """Split documents into "train", "calibration" and "heldout".

    Held-out are the last `heldout_count` documents, in order. Calibration documents are the
    `calibration_fraction` (rounded, at least one) of the train documents whose ids have the smallest sha256. They
    stay in train as well: importance is estimated on training data (arXiv:2407.14679, section 4).

    Raises:
        ConfigError: A fraction outside (0, 1) (calibration may be 1), or `num_heldout` below 1.
        DataError: Too few documents for at least one of each kind.
    """
    _check_fraction(calibration_fraction, "data.calibration_fraction", allow_one=True)
    num_train = len(documents) - heldout_count(len(documents), num_heldout, heldout_fraction)
    train = list(documents[:num_train])
    num_calibration = max(1, round(calibration_fraction * num_train))
    order = sorted(range(num_train), key=lambda i: hashlib.sha256(train[i].id.encode()).digest())
    calibration = [train[i] for i in sorted(order[:num_calibration])]
    return {"train": train, "calibration": calibration, "heldout": list(documents[num_train:])}


def heldout_count(num_documents: int, num_heldout: int | None, heldout_fraction: float) -> int:
    """How many documents to hold out: `num_heldout`, or where None the rounded fraction, at least one.

    Raises `ConfigError` on a bad setting and `DataError` when no document would be left to train on.
    """
    if num_heldout is None:
        _check_fraction(heldout_fraction, "data.heldout_fraction", allow_one=False)
        num_heldout = max(1, round(heldout_fraction * num_documents))
    if num_heldout < 1:
        raise ConfigError("no held-out documents", expected="at least 1", found=str(num_heldout),
                          key="data.num_heldout")
    if num_heldout >= num_documents:
        raise DataError("too few documents", expected=f"more than the {num_heldout} held out",
                        found=f"{num_documents}", key="data.path, data.separator or data.num_heldout")
    return num_heldout


def _check_fraction(value: float, key: str, *, allow_one: bool) -> None:
    if not 0 < value < 1 and not (allow_one and value == 1):
        raise ConfigError("bad fraction", expected=f"above 0 and {'at most' if allow_one else 'below'} 1",
                          found=str(value), key=key)


def text_files(folder: Path) -> dict[str, Path]:
    """Relative posix path -> file, sorted by the former."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    visible = (name for name in names if not any(part.startswith(".") for part in name.parts))
    return {name: folder / name for name in sorted(name.as_posix() for name in visible)}


def read_pieces(file: Path, separator: str | None, *, key: str = "data.path") -> list[str]:
    """A file that is no JSON lines as documents, also those of only whitespace.

    Raises `DataError` (naming `key`) where it is not UTF-8 text.
    """
    text = _read_text(file, key)
    return [piece.strip() for piece in text.split(separator)] if separator else [text]


def _read_text(file: Path, key: str) -> str:
    """The file's text with its line ends unchanged; binary content is a `DataError` that says where."""
    data = file.read_bytes()
    if (offset := data.find(b"\0")) >= 0:
        raise DataError("not a text file", expected=f"UTF-8 text in {file}", found=f"a NUL byte at offset {offset}",
                        key=key)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("not a text file", expected=f"UTF-8 text in {file}",
                        found=f"invalid UTF-8 at offset {error.start}", key=key) from None
