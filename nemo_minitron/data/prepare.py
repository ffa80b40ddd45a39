"""From text to token files, once: `directory/<digest>/{train,calibration,heldout}.{bin,idx}` and `data.json`.

The digest covers the text, its split and the tokenizer, so that another of these is another folder. `data.json`
is written last, atomically: a folder without it, or whose files have other sizes than it says, is written anew.
One process prepares (Megatron is imported only when there is something to write, or with token files of the
user's own); every other reads.

Four kinds of data:

- "corpus": the embedded corpus, split by file (`corpus`). Calibration text is disjoint from the train text.
- "text": a file or folder of the user's own, split by document (`text.split_documents`).
- "chat": conversations in JSON lines (`conversations`), split like text, with a second pair of files for each split:
  `SPLIT_answers.{bin,idx}`, 1 for each token that an assistant says (`chat`).
- "indexed": Megatron .bin/.idx files used where they are. `path` is a folder with the prefixes `train`, `heldout`
  and perhaps `calibration`, or one prefix of which the last documents are held out. Where there is no
  calibration prefix, calibration samples are drawn from all of the train tokens.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.artifacts import digest_json, read_json, write_json
from nemo_minitron.data import corpus, indexed
from nemo_minitron.data.chat import chat_template as read_template
from nemo_minitron.data.chat import encode_conversation
from nemo_minitron.data.conversations import messages_of, read_conversations
from nemo_minitron.data.indexed import IndexedTokens, TokenRange
from nemo_minitron.data.text import Document, heldout_count, read_documents, split_documents
from nemo_minitron.data.tokenizer import encode_documents, load_tokenizer, num_pieces, tokenizer_digest
from nemo_minitron.errors import ConfigError, DataError

KINDS = ("corpus", "text", "indexed", "chat")
_FORMAT = 1  # part of the digest: raise it when the same text and tokenizer give other tokens
_DOCUMENTS_PER_CALL = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Token files ready to be read: one range of tokens for each of "train", "calibration" and "heldout".

    `num_heldout_bytes` is the UTF-8 size of the held-out text, the denominator of bits per byte (None where only
    tokens are known). `digest` identifies text, split and tokenizer (and chat template). `chat`: there are answers.
    """

    splits: dict[str, TokenRange]
    num_heldout_bytes: int | None
    digest: str
    chat: bool = False

    def open(self, split: str) -> IndexedTokens:
        """The split's tokens; imports Megatron. Raises `DataError` where its files are gone or truncated."""
        tokens = self.splits[split]
        return indexed.open_tokens(tokens.prefix, start=tokens.start, num_tokens=tokens.num_tokens)

    def open_answers(self, split: str) -> IndexedTokens:
        """Of chat data: 1 for each of the split's tokens that is an answer's, else 0."""
        assert self.chat
        return indexed.open_tokens(_answers(self.splits[split].prefix))


def prepare(*, kind: str, directory: Path, tokenizer_directory: Path, path: Path | None = None,
            separator: str | None = None, json_key: str = "text", num_heldout: int | None = None,
            heldout_fraction: float = 0.02, calibration_fraction: float = 0.1,
            chat_template: Path | None = None) -> PreparedData:
    """Tokenize the text with the tokenizer in `tokenizer_directory`, or find it done before.

    `path` is needed by all but "corpus"; `chat_template` is a file, None the tokenizer's own template; `separator`,
    `json_key`, `num_heldout`, `heldout_fraction` (and, for "text" and "chat", `calibration_fraction`) mean what they do
    in `text`.

    Raises:
        ConfigError: An unknown `kind`, a missing `path`, a fraction that is none.
        DataError: Text, token files or a tokenizer that cannot be used.
    """
    if kind not in KINDS:
        raise ConfigError("unknown kind of data", expected=f"one of {', '.join(KINDS)}", found=kind, key="data.kind")
    if kind == "corpus":
        corpus.verify()
        return _prepare_text(_corpus_documents(), tokenizer_directory, directory)
    if path is None:
        raise ConfigError("no data", expected=f"a path for kind {kind}", found="none", key="data.path")
    if kind == "indexed":
        return _use_indexed(path, num_heldout, heldout_fraction)
    found = read_conversations(path) if kind == "chat" else read_documents(path, separator=separator, json_key=json_key)
    documents = split_documents(found, num_heldout=num_heldout, heldout_fraction=heldout_fraction,
                                calibration_fraction=calibration_fraction)
    if kind == "chat":
        return _prepare_chat(documents, tokenizer_directory, directory, chat_template)
    return _prepare_text(documents, tokenizer_directory, directory)


def _corpus_documents() -> dict[str, list[Document]]:
    root = corpus.corpus_root()
    return {split: [Document(file.relative_to(root).as_posix(), file.read_bytes().decode("utf-8"))
                    for file in corpus.corpus_files(split)] for split in corpus.SPLITS}


def _identity(documents: dict[str, list[Document]], tokenizer_directory: Path) -> dict[str, Any]:
    texts = {split: [hashlib.sha256(document.text.encode()).hexdigest() for document in documents[split]]
             for split in corpus.SPLITS}
    return {"format": _FORMAT, "texts": texts, "tokenizer": tokenizer_digest(tokenizer_directory)}


def _prepare_text(documents: dict[str, list[Document]], tokenizer_directory: Path, directory: Path) -> PreparedData:
    tokenizer = load_tokenizer(tokenizer_directory)
    digest = digest_json(_identity(documents, tokenizer_directory))
    folder = directory / digest[:16]
    if (found := _read(folder, digest)) is not None:
        return found
    with _alone(folder):
        if (found := _read(folder, digest)) is not None:  # another job has just made it
            return found
        dtype = indexed.token_dtype(num_pieces(tokenizer))
        num_tokens = {split: indexed.build(folder / split, _encoded(tokenizer, documents[split]), dtype)
                      for split in corpus.SPLITS}
        write_json(folder / "data.json", {
            "digest": digest,
            "num_tokens": num_tokens,
            "num_documents": {split: len(documents[split]) for split in corpus.SPLITS},
            "num_heldout_bytes": sum(len(document.text.encode()) for document in documents["heldout"]),
            "file_sizes": _file_sizes(folder),
        })
        prepared = _read(folder, digest)
        assert prepared is not None
        return prepared


def _prepare_chat(documents: dict[str, list[Document]], tokenizer_directory: Path, directory: Path,
                  template_file: Path | None) -> PreparedData:
    tokenizer = load_tokenizer(tokenizer_directory)
    template = read_template(tokenizer, template_file)
    digest = digest_json({**_identity(documents, tokenizer_directory), "chat_template": template})
    folder = directory / digest[:16]
    if (found := _read(folder, digest)) is not None:
        return found
    with _alone(folder):
        if (found := _read(folder, digest)) is not None:  # another job has just made it
            return found
        dtype = indexed.token_dtype(num_pieces(tokenizer))
        num_tokens, num_answer_tokens = {}, {}
        for split in corpus.SPLITS:
            encoded = [encode_conversation(tokenizer, template, messages_of(document), document.id)
                       for document in documents[split]]
            num_tokens[split] = indexed.build(folder / split, (ids for ids, _ in encoded), dtype)
            indexed.build(_answers(folder / split), (answers for _, answers in encoded), np.uint8)
            num_answer_tokens[split] = sum(int(answers.sum()) for _, answers in encoded)
        write_json(folder / "data.json", {
            "digest": digest,
            "chat": True,
            "num_tokens": num_tokens,
            "num_answer_tokens": num_answer_tokens,
            "num_documents": {split: len(documents[split]) for split in corpus.SPLITS},
            "num_heldout_bytes": None,
            "file_sizes": _file_sizes(folder),
        })
        prepared = _read(folder, digest)
        assert prepared is not None
        return prepared


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One job at a time writes the folder: candidates of a search may start together."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _answers(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + "_answers")


def _encoded(tokenizer: Any, documents: list[Document]) -> Iterator[NDArray[np.int32]]:
    for first in range(0, len(documents), _DOCUMENTS_PER_CALL):
        batch = documents[first : first + _DOCUMENTS_PER_CALL]
        yield from encode_documents(tokenizer, [document.text for document in batch])


def _read(folder: Path, digest: str) -> PreparedData | None:
    """What `folder` holds, or None where it is not complete."""
    if not (folder / "data.json").exists():
        return None
    record = read_json(folder / "data.json")
    if record["digest"] != digest or record["file_sizes"] != _file_sizes(folder):
        return None
    splits = {split: TokenRange(prefix=folder / split, start=0, num_tokens=record["num_tokens"][split])
              for split in corpus.SPLITS}
    return PreparedData(splits=splits, num_heldout_bytes=record["num_heldout_bytes"], digest=digest,
                        chat=record.get("chat", False))


def _file_sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of the token files, without what an interrupted run left behind (names with a dot in front)."""
    files = (file for pattern in ("*.bin", "*.idx") for file in folder.glob(pattern))
    return {file.name: file.stat().st_size for file in sorted(files) if not file.name.startswith(".")}


def _use_indexed(path: Path, num_heldout: int | None, heldout_fraction: float) -> PreparedData:
    if path.is_dir():
        names = {split: path / split for split in corpus.SPLITS}
        if not indexed.idx_path(names["calibration"]).exists():
            names["calibration"] = names["train"]
        splits = {split: _range(prefix, 0, int(indexed.document_offsets(prefix)[-1]))
                  for split, prefix in names.items()}
    else:
        offsets = indexed.document_offsets(path)
        num_documents = len(offsets) - 1
        num_train = num_documents - heldout_count(num_documents, num_heldout, heldout_fraction)
        train = _range(path, 0, int(offsets[num_train]))
        splits = {"train": train, "calibration": train,
                  "heldout": _range(path, train.num_tokens, int(offsets[-1]) - train.num_tokens)}
    identities = {split: [_file_identity(tokens.prefix), tokens.start, tokens.num_tokens]
                  for split, tokens in splits.items()}
    return PreparedData(splits=splits, num_heldout_bytes=None, digest=digest_json(identities))


def _range(prefix: Path, start: int, num_tokens: int) -> TokenRange:
    if not num_tokens:
        raise DataError("an empty split", expected=f"tokens in {indexed.bin_path(prefix)}", found="none",
                        key="data.path or data.heldout_fraction")
    return TokenRange(prefix=prefix, start=start, num_tokens=num_tokens)


def _file_identity(prefix: Path) -> list[Any]:
    """Digest of the index, and of the size and both ends of the token file: it may be too large to read whole."""
    with open(indexed.idx_path(prefix), "rb") as file:
        index = hashlib.file_digest(file, "sha256").hexdigest()
    end_bytes = 1 << 20
    size = indexed.bin_path(prefix).stat().st_size
    with open(indexed.bin_path(prefix), "rb") as file:
        first = file.read(end_bytes)
        file.seek(max(size - end_bytes, 0))
        last = file.read(end_bytes)
    return [index, size, hashlib.sha256(first + last).hexdigest()]
