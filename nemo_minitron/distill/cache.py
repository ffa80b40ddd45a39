"""The teacher's likeliest tokens on disk: written once, read by the same training step instead of running the teacher.

A cache is a folder of safetensors files, some hundred samples each, and `index.json`, written last. It is keyed by
sample id, so it serves any layout, batch size or order. Of each token it holds the ids and log-probabilities of k
tokens, the log-probability of all others together, and that of the label.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.numpy import save

from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.checkpoint.container import read_header
from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.teacher import HandedOver
from nemo_minitron.distill.top_k import TopK
from nemo_minitron.errors import CheckpointError, DataError
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.clock import Stopwatch
from nemo_minitron.parallel.cpu import device

INDEX_FILE = "index.json"
DTYPES = {"float16": np.float16, "float32": np.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What a cache is of. Training reads it where both digests and `seq_length` are its own, and k is large enough.

    `dtype` is what log-probabilities are stored in, a key of `DTYPES`.
    """

    teacher_digest: str
    data_digest: str
    seq_length: int
    vocab_size: int
    k: int
    dtype: str


def shard_path(folder: Path, number: int) -> Path:
    """File of the `number`-th group of samples."""
    return folder / f"shard-{number:06d}.safetensors"


def write_shard(path: Path, sample_ids: Sequence[int], parts: Sequence[TopK], key: CacheKey) -> None:
    """Write one file, atomically. `parts` are micro-batches in order, [S * B] token by token of B samples each.

    The last may hold more samples than are left of `sample_ids`: filling, which is dropped. Stored are `ids` [n, S, k]
    (uint16 where the vocabulary allows it), `log_probs` [n, S, k] and `log_tail` [n, S] of `key.dtype`,
    `label_log_probs` [n, S] float32, and `sample_ids` [n] int64.
    """
    def stored(name: str, dtype: Any) -> np.ndarray:
        rows = [getattr(part, name).reshape(key.seq_length, -1, *getattr(part, name).shape[1:]).transpose(0, 1)
                for part in parts]
        return np.ascontiguousarray(torch.cat(rows)[: len(sample_ids)].cpu().numpy().astype(dtype))

    dtype = DTYPES[key.dtype]
    tensors = {"ids": stored("ids", np.uint16 if key.vocab_size <= 65536 else np.int32),
               "log_probs": stored("log_probs", dtype), "log_tail": stored("log_tail", dtype),
               "label_log_probs": stored("label_log_probs", np.float32),
               "sample_ids": np.asarray(sample_ids, np.int64)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(save(tensors))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_cache_index(folder: Path, num_shards: int, key: CacheKey) -> dict[str, Any]:
    """Say that the cache is whole: the key, the samples' places, the files' sizes and the bytes per token."""
    samples, sizes = [], []
    for number in range(num_shards):
        path = shard_path(folder, number)
        with safetensors.safe_open(path, "numpy") as shard:
            samples.append(shard.get_tensor("sample_ids").tolist())
        sizes.append(path.stat().st_size)
    num_tokens = key.seq_length * sum(len(part) for part in samples)
    record = {"key": dataclasses.asdict(key), "samples": samples, "file_sizes": sizes, "num_tokens": num_tokens,
              "bytes_per_token": round(sum(sizes) / max(num_tokens, 1), 2)}
    write_json(folder / INDEX_FILE, record)
    return record


class CachedTeacher:
    """Hands over what a cache holds of each batch, in the teacher's place. Every TP rank of the last stage reads it."""

    runs_ahead = False
    knows_any_text = False

    def __init__(self, folder: Path, *, teacher_digest: str, data_digest: str, seq_length: int, k: int) -> None:
        """Open the cache in `folder`.

        Raises:
            DataError: no whole cache there, or one of another teacher, other data (which includes the tokenizer) or
                sample length, of fewer tokens than `k`, or with files that are missing or truncated.
        """
        if not (folder / INDEX_FILE).is_file():
            raise DataError("no cache of a teacher", expected=f"{INDEX_FILE} in {folder} (stage cache_teacher)",
                            found="none", key="distill.cache")
        record = read_json(folder / INDEX_FILE)
        try:
            self.key = CacheKey(**record["key"])
            samples, sizes = record["samples"], record["file_sizes"]
        except (KeyError, TypeError) as error:
            raise DataError("not a cache of a teacher", expected=f"what cache_teacher writes in {folder / INDEX_FILE}",
                            found=f"{type(error).__name__}: {error}", key="distill.cache") from None
        for what, wanted in (("teacher_digest", teacher_digest), ("data_digest", data_digest),
                             ("seq_length", seq_length)):
            if getattr(self.key, what) != wanted:
                raise DataError(f"a cache of another {what.removesuffix('_digest')}", expected=str(wanted)[:16],
                                found=f"{str(getattr(self.key, what))[:16]} in {folder}", key="distill.cache")
        if self.key.k < k:
            raise DataError("a cache of fewer tokens", expected=f"at least {k}", found=f"{self.key.k} in {folder}",
                            key="distill.top_k or distill.cache")
        self.k = k
        self.stopwatch = Stopwatch()
        self._shards = [shard_path(folder, number) for number in range(len(sizes))]
        for path, size in zip(self._shards, sizes, strict=True):
            _check_file(path, size)
        self._places = {sample: (number, row) for number, part in enumerate(samples) for row, sample in enumerate(part)}
        self._open: dict[int, Any] = {}

    def prepare(self, batches: list[Batch]) -> None:
        """Nothing to run ahead of the student's schedule."""

    def hand_over(self, batch: Batch) -> HandedOver:
        """The batch's tokens, on the last pipeline stage; nothing on the others."""
        if not groups.is_last_stage():
            return HandedOver()
        with self.stopwatch:
            return HandedOver(logits=self.states(batch))

    def states(self, batch: Batch) -> TopK:
        """The batch's tokens in the order of the loss, [S * B, k]; `DataError` for a sample that was not cached."""
        rows = [self._row(int(sample)) for sample in batch.sample_ids]

        def gathered(name: str, dtype: torch.dtype) -> torch.Tensor:
            stacked = torch.from_numpy(np.stack([row[name] for row in rows], axis=1))  # [S, B, ...]
            return stacked.to(dtype).reshape(-1, *stacked.shape[2:]).to(device())

        log_probs, log_tail = gathered("log_probs", torch.float32), gathered("log_tail", torch.float32)
        if self.k < self.key.k:  # the tokens from k on join the tail
            log_tail = torch.logaddexp(log_tail, log_probs[:, self.k :].logsumexp(1))
        return TopK(ids=gathered("ids", torch.int64)[:, : self.k], log_probs=log_probs[:, : self.k], log_tail=log_tail,
                    label_log_probs=gathered("label_log_probs", torch.float32))

    def _row(self, sample: int) -> dict[str, np.ndarray]:
        if sample not in self._places:
            raise DataError("a sample that was not cached", found=f"{len(self._places)} others", key="distill.cache",
                            expected=f"sample {sample}, which distill.tokens, train.global_batch_size and seed ask for")
        number, row = self._places[sample]
        if number not in self._open:
            self._open[number] = safetensors.safe_open(self._shards[number], "numpy")
        shard = self._open[number]
        return {name: np.array(shard.get_slice(name)[row], dtype=None if name != "ids" else np.int64)
                for name in ("ids", "log_probs", "log_tail", "label_log_probs")}


def _check_file(path: Path, size: int) -> None:
    try:
        read_header(path)
        found = path.stat().st_size
    except (CheckpointError, OSError, json.JSONDecodeError) as error:
        raise DataError("a broken cache of a teacher", expected=f"a whole file {path}", found=str(error),
                        key="distill.cache") from None
    if found != size:
        raise DataError("a truncated cache of a teacher", expected=f"{size} bytes in {path}", found=f"{found}",
                        key="distill.cache")
