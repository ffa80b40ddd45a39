"""Text or JSON lines of any size -> one .bin/.idx pair, by several processes, resumable.

The input is cut into shards: byte ranges of JSON lines, whole files of other text, small ones together. Each is
tokenized by some process into `PREFIX.parts/NNNNNN.{bin,lengths,json}`, the `.json` last; a part has its name only when
it is on disk. When all are there they are put together in order, so that the result does not depend on the number of
processes or on where an earlier run was killed; it is byte for byte what `indexed.build` writes for the same documents.
`PREFIX.json` comes last and says what the pair was made from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO, Any

import numpy as np

from nemo_minitron.artifacts import digest_json, read_json, write_json
from nemo_minitron.data import jsonl
from nemo_minitron.data.indexed import TokenDtype, bin_path, idx_path, write_index
from nemo_minitron.data.text import SUFFIXES, read_pieces, text_files
from nemo_minitron.data.tokenizer import encode_documents, load_tokenizer, num_pieces, tokenizer_digest
from nemo_minitron.errors import ConfigError, DataError, UserError

_FORMAT = 1  # part of the digest: raise it when the same input gives other files
_DOCUMENTS_PER_CALL = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class BulkInput:
    """What is tokenized. `separator` cuts plain text files into documents; `json_key` names the text of JSON lines."""

    path: Path
    tokenizer: Path
    json_key: str = "text"
    separator: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Pieces `(file, start, end)`: bytes `[start, end)` of a file, the whole of it where it is no JSON lines."""

    pieces: tuple[tuple[str, int, int], ...]

    @property
    def num_bytes(self) -> int:
        """Of all pieces."""
        return sum(end - start for _, start, end in self.pieces)


def build_bulk(what: BulkInput, prefix: Path, *, workers: int, shard_bytes: int | None = None,
               say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)) -> dict[str, Any]:
    """Write `prefix`.bin, .idx and .json; returns what is in the latter (counts of documents, tokens, bytes).

    Documents without anything but whitespace are left out and counted. An earlier run's parts are used again where
    input, tokenizer and options are the same; a finished pair is left as it is. Shards have about `shard_bytes`; None:
    1/512 of the input, from 1 to 64 MiB.

    Raises:
        ConfigError: a `prefix` that is none, or where other files are.
        DataError: input that cannot be read, has no text, or no space left on the device.
    """
    if not prefix.name:
        raise ConfigError("no prefix", expected="a path such as tokens/web", found=repr(str(prefix)), key="output")
    try:
        return _build(what, prefix, workers, shard_bytes, say)
    except OSError as error:
        raise _disk_error(error, prefix) from None


def _build(what: BulkInput, prefix: Path, workers: int, shard_bytes: int | None,
           say: Callable[[str], None]) -> dict[str, Any]:
    record_path, parts = prefix.with_name(prefix.name + ".json"), prefix.with_name(prefix.name + ".parts")
    shards = _shards(what, shard_bytes)
    digest = _digest(what, shards)
    record = _finished(prefix, record_path, digest)
    if record is not None:
        shutil.rmtree(parts, ignore_errors=True)  # of a run killed just after its last file
        say(f"[prepare] {prefix} is done: {record['num_tokens']:,} tokens")
        return record
    dtype = stored_dtype(num_pieces(load_tokenizer(what.tokenizer, key="tokenizer")))
    parts.mkdir(parents=True, exist_ok=True)
    plan = {"digest": digest, "num_shards": len(shards)}
    if not (parts / "plan.json").exists() or read_json(parts / "plan.json") != plan:
        shutil.rmtree(parts)
        parts.mkdir()
        write_json(parts / "plan.json", plan)
    _tokenize(what, shards, parts, workers, dtype, say)
    record = {"digest": digest, **_join(what, parts, len(shards), prefix, dtype)}
    write_json(record_path, record)
    shutil.rmtree(parts)
    say(f"[prepare] {prefix}: {record['num_documents']:,} documents, {record['num_tokens']:,} tokens")
    return record


def _shards(what: BulkInput, shard_bytes: int | None) -> list[Shard]:
    if not what.path.exists():
        raise DataError("no text", expected=f"a file or folder at {what.path}", found="nothing", key="input")
    files = {what.path.name: what.path} if what.path.is_file() else text_files(what.path)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    room = shard_bytes or min(max(sum(sizes.values()) // 512, 1 << 20), 64 << 20)
    shards: list[Shard] = []
    pieces: list[tuple[str, int, int]] = []
    held = 0
    for name, size in sizes.items():
        step = room if files[name].suffix == jsonl.SUFFIX else max(size, 1)
        for start in range(0, size, step):
            end = min(start + step, size)
            if pieces and held + end - start > room:
                shards.append(Shard(pieces=tuple(pieces)))
                pieces, held = [], 0
            pieces.append((name, start, end))
            held += end - start
    if not pieces:
        raise DataError("no text", expected=f"{', '.join('*' + suffix for suffix in SUFFIXES)} below {what.path}",
                        found="none" if not files else "only empty files", key="input")
    return [*shards, Shard(pieces=tuple(pieces))]


def _digest(what: BulkInput, shards: list[Shard]) -> str:
    """Of everything that decides the result; of files, size and time of change stand for the contents."""
    files = {name: _file(what, name).stat() for shard in shards for name, _, _ in shard.pieces}
    return digest_json({
        "format": _FORMAT, "json_key": what.json_key, "separator": what.separator,
        "tokenizer": tokenizer_digest(what.tokenizer), "shards": [shard.pieces for shard in shards],
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}})


def _file(what: BulkInput, name: str) -> Path:
    return what.path if what.path.is_file() else what.path / name


def _finished(prefix: Path, record_path: Path, digest: str) -> dict[str, Any] | None:
    """The record of a finished pair of the same input; None where there is nothing yet."""
    pair = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
    if record_path.exists():
        record: dict[str, Any] = read_json(record_path)
        sizes = [path.stat().st_size for path in pair]
        if record.get("digest") == digest and record.get("file_sizes") == sizes:
            return record
    elif not pair or prefix.with_name(prefix.name + ".parts").exists():
        return None  # killed while the pair was put in place
    raise ConfigError("output exists", expected=f"no files at {prefix}, or those of the same input",
                      found=", ".join(path.name for path in [*pair, record_path] if path.exists()), key="output")


def _tokenize(what: BulkInput, shards: list[Shard], parts: Path, workers: int, dtype: TokenDtype,
              say: Callable[[str], None]) -> None:
    for leftover in parts.glob("*.partial"):
        leftover.unlink()
    missing = [number for number in range(len(shards)) if not _is_whole(parts, number, dtype)]
    total = sum(shard.num_bytes for shard in shards)
    before = done = total - sum(shards[number].num_bytes for number in missing)
    if before:
        say(f"[prepare] {len(shards) - len(missing)} of {len(shards)} shards are there from an earlier run")
    if not missing:
        return
    started = time.monotonic()
    pool = ProcessPoolExecutor(min(workers, len(missing)), mp_context=multiprocessing.get_context("spawn"),
                               initializer=_start_worker, initargs=(what, os.getpid()))
    try:
        futures = {pool.submit(_tokenize_shard, what, shards[number], parts, number, dtype): number
                   for number in missing}
        num_documents = num_tokens = 0
        for future in as_completed(futures):
            counts = future.result()
            done += shards[futures[future]].num_bytes
            num_documents, num_tokens = num_documents + counts["num_documents"], num_tokens + counts["num_tokens"]
            rate = (done - before) / max(time.monotonic() - started, 1e-9)
            say(f"[prepare] {done / total:4.0%}  {num_documents:,} documents  {num_tokens:,} tokens  "
                f"{rate / 1e6:.1f} MB/s  {(total - done) / max(rate, 1e-9):,.0f} s to go")
    except BrokenProcessPool:
        raise RuntimeError("a process that tokenizes died (out of memory?); the same command goes on") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(what: BulkInput, parent: int) -> None:
    """Load the tokenizer once a process, on one thread, and end with the process that started it."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker["tokenizer"] = load_tokenizer(what.tokenizer)


def _tokenize_shard(what: BulkInput, shard: Shard, parts: Path, number: int, dtype: TokenDtype) -> dict[str, int]:
    """Write one shard's part; `DataError` where the input or the disk does not allow it."""
    tokenizer = _worker["tokenizer"]
    counts = {"num_documents": 0, "num_empty": 0, "num_tokens": 0, "num_text_bytes": 0}
    try:
        with _written(_part(parts, number, "bin")) as tokens, _written(_part(parts, number, "lengths")) as lengths:
            for texts in _batches(_documents(what, shard)):
                kept = [text for text in texts if text.strip()]
                encoded = [(text, ids) for text, ids in zip(kept, encode_documents(tokenizer, kept), strict=True)
                           if len(ids)]
                for text, ids in encoded:
                    tokens.write(ids.astype(dtype).tobytes())
                    lengths.write(np.int32(len(ids)).tobytes())
                    counts["num_tokens"] += len(ids)
                    counts["num_text_bytes"] += len(text.encode())
                counts["num_documents"] += len(encoded)
                counts["num_empty"] += len(texts) - len(encoded)
        write_json(_part(parts, number, "json"), counts)
    except OSError as error:
        raise _disk_error(error, parts) from None
    return counts


def stored_dtype(vocab_size: int) -> TokenDtype:
    """What `indexed.token_dtype` says, without importing Megatron."""
    return np.uint16 if vocab_size < 65500 else np.int32


def _documents(what: BulkInput, shard: Shard) -> Iterator[str]:
    for name, start, end in shard.pieces:
        file = _file(what, name)
        if file.suffix == jsonl.SUFFIX:
            yield from jsonl.read_lines(file, what.json_key, start=start, end=end)
        else:
            yield from read_pieces(file, what.separator, key="input")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _DOCUMENTS_PER_CALL:
            yield batch
            batch = []
    if batch:
        yield batch


def _part(parts: Path, number: int, suffix: str) -> Path:
    return parts / f"{number:06d}.{suffix}"


def _is_whole(parts: Path, number: int, dtype: TokenDtype) -> bool:
    """Whether an earlier run left a part, with the sizes that its counts say."""
    paths = [_part(parts, number, suffix) for suffix in ("json", "bin", "lengths")]
    if not all(path.exists() for path in paths):
        return False
    counts = read_json(paths[0])
    sizes = [counts["num_tokens"] * np.dtype(dtype).itemsize, counts["num_documents"] * np.dtype(np.int32).itemsize]
    return [path.stat().st_size for path in paths[1:]] == sizes


@contextlib.contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name when it is whole and on disk, and is gone after an error."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _join(what: BulkInput, parts: Path, num_shards: int, prefix: Path, dtype: TokenDtype) -> dict[str, Any]:
    """Put the parts together as `prefix`.bin and .idx."""
    counts = [read_json(_part(parts, number, "json")) for number in range(num_shards)]
    totals: dict[str, Any] = {name: sum(count[name] for count in counts) for name in counts[0]}
    if not totals["num_documents"]:
        raise DataError("no text", expected=f'text in {what.path} (in JSON lines under "{what.json_key}")',
                        found=f"{totals['num_empty']} documents of nothing but whitespace", key="input or json_key")
    lengths = np.concatenate([np.fromfile(_part(parts, number, "lengths"), np.int32) for number in range(num_shards)])
    temporary = parts / "whole"
    try:
        with open(bin_path(temporary), "wb") as whole:
            for number in range(num_shards):
                with open(_part(parts, number, "bin"), "rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 22)
            whole.flush()
            os.fsync(whole.fileno())
        write_index(idx_path(temporary), lengths, dtype)
        for path in (bin_path, idx_path):
            os.replace(path(temporary), path(prefix))
    finally:
        for path in (bin_path, idx_path):
            path(temporary).unlink(missing_ok=True)
    return totals | {"file_sizes": [path(prefix).stat().st_size for path in (bin_path, idx_path)]}


def _disk_error(error: OSError, where: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DataError("no space left on the device", expected=f"room for the token files at {where}",
                         found=os.strerror(error.errno), key="output; what is done stays and is used again")
    return DataError("cannot read or write", expected=f"access to {error.filename or where}",
                     found=error.strerror or "", key="input or output")
