"""Stage `cache_teacher`: the teacher's likeliest tokens for every sample that `distill` will see, on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from nemo_minitron.data.batch import Batch
from nemo_minitron.distill.cache import INDEX_FILE, CacheKey, shard_path, write_cache_index, write_shard
from nemo_minitron.distill.teacher import Placement, Teacher
from nemo_minitron.evaluate.loss import padded_batch
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import device
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.data import prepared_data, split_samples
from nemo_minitron.stages.teaching import teacher_precision
from nemo_minitron.training.budget import num_steps

SHARD_SAMPLES = 256


def run(context: Context) -> dict[str, Any]:
    """Write `shard-NNNNNN.safetensors` and `index.json`; every rank takes part, replicas take shards in turn.

    A shard that an earlier, killed run left whole is kept.
    """
    config, directory = context.config, context.stage_dir("cache_teacher")
    teacher = context.teacher()
    context.layout.check(teacher.arch, name="teacher", seq_length=config.data.seq_length)
    prepared = prepared_data(context, teacher.path, teacher.arch)
    samples = split_samples(context, prepared, "train", teacher.arch)
    samples.check_training()
    key = CacheKey(teacher_digest=teacher.weights_digest, data_digest=prepared.digest, k=config.distill.top_k,
                   seq_length=config.data.seq_length, vocab_size=teacher.arch.vocab_size,
                   dtype=config.distill.cache_dtype)
    steps = num_steps(config.distill.tokens, global_batch_size=config.train.global_batch_size,
                      seq_length=config.data.seq_length)
    positions = range(steps * config.train.global_batch_size)
    ids = np.unique([samples.training_id(position, config.seed) for position in positions])
    shards = np.array_split(ids, -(-len(ids) // SHARD_SAMPLES))
    placement = Placement(precision=teacher_precision(config.distill, config.train))
    model = Teacher(teacher.arch, teacher.path, context.layout, placement=placement, top_k=key.k,
                    chunk_tokens=config.train.chunk_tokens)
    missing: list[int] = context.share([number for number in range(len(shards))
                                        if not shard_path(directory, number).exists()])
    size, started = config.evaluate.micro_batch_size, time.monotonic()
    for turn, number in enumerate(missing[groups.dp_rank() :: context.layout.dp]):
        rows = shards[number]

        def batches(rows: np.ndarray = rows) -> Iterator[Batch]:
            for first in range(0, len(rows), size):
                yield padded_batch(samples, rows[first : first + size], size).to(device())

        found = model.top_k_of(batches(), num_microbatches=-(-len(rows) // size))
        if groups.is_last_stage() and groups.tp_rank() == 0:
            write_shard(shard_path(directory, number), rows.tolist(), found, key)
        done = min((turn + 1) * context.layout.dp, len(missing))
        rate = done * SHARD_SAMPLES * key.seq_length / (time.monotonic() - started)
        context.say(f"[cache_teacher] {done}/{len(missing)} shards  {rate:,.0f} tokens/s  "
                    f"{(len(missing) - done) * SHARD_SAMPLES * key.seq_length / rate:,.0f} s to go")
    context.barrier()
    record = write_cache_index(directory, len(shards), key) if context.rank == 0 else None
    record = context.share(record)
    context.say(f"[cache_teacher] {record['num_tokens']:,} tokens, k {key.k}, {record['bytes_per_token']} bytes/token")
    return {"teacher_digest": key.teacher_digest, "data_digest": key.data_digest, "num_samples": len(ids),
            "tokens": record["num_tokens"], "bytes_per_token": record["bytes_per_token"], "index": INDEX_FILE}
