"""Which data a recipe means, and what identifies it before it is tokenized. Standard library only."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from nemo_minitron.data.text import text_files


def resolve_kind(kind: str, path: str | None) -> str:
    """What `auto` means: the corpus without a path, token files where `path` names them, else text."""
    if kind != "auto":
        return kind
    if path is None:
        return "corpus"
    return "indexed" if Path(f"{path}.idx").exists() or (Path(path) / "train.idx").exists() else "text"


def source_digest(kind: str, path: str | None) -> str | None:
    """SHA-256 (hex) of the names and contents of the user's files; None for the corpus, which cannot differ.

    Of a `.bin` file, which may be too large to read, the size stands for the content; its `.idx` is read.
    A path that does not exist has the digest of nothing: the stage that reads it says what is wrong.
    """
    if path is None or resolve_kind(kind, path) == "corpus":
        return None
    files = _source_files(Path(path), resolve_kind(kind, path))
    stamps = tuple((name, file, file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items())
    return _digest(stamps)


def _source_files(path: Path, kind: str) -> dict[str, Path]:
    if kind in ("text", "chat"):
        return {path.name: path} if path.is_file() else text_files(path)
    found = [*path.glob("*.idx"), *path.glob("*.bin")] if path.is_dir() else [Path(f"{path}.idx"), Path(f"{path}.bin")]
    return {file.name: file for file in sorted(found) if file.is_file()}


@lru_cache(maxsize=256)  # the sources of a blend are asked for in turn
def _digest(stamps: tuple[tuple[str, Path, int, int], ...]) -> str:
    """Digest of the files that `stamps` lists; size and time of change say whether they must be read again."""
    total = hashlib.sha256()
    for name, file, size, _ in stamps:
        total.update(f"{name}:{size}:".encode())
        if file.suffix != ".bin":
            with open(file, "rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
