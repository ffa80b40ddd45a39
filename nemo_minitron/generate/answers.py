"""Answers to a file of prompts, written block by block, so that a killed run goes on and ends with the same file.

A block is a fixed range of prompts in the file's order. It is generated as a whole and flushed to disk as a whole;
a run that goes on drops what lies behind the last whole block.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ANSWERS = "answers.jsonl"
"""The file's name in the stage's directory."""

Block = Callable[[int, int], list[dict[str, Any]]]
"""Answers to the prompts from the first number up to, not with, the second; every rank calls it with the same ones."""


def write_answers(path: Path, num_prompts: int, block_size: int, answer: Block, *, rank: int,
                  share: Callable[[Any], Any], say: Callable[[str], None]) -> None:
    """Write `path`, one JSON line a prompt; every rank must call this, and rank 0 writes.

    Args:
        path: appears when it is whole; until then its lines are in `path`.partial.
        num_prompts: of the file.
        block_size: prompts that are answered together.
        answer: gives the rows of a block.
        rank: the global rank.
        share: gives every rank what rank 0 passes to it.
        say: prints a line of progress.
    """
    partial = path.with_name(path.name + ".partial")
    if share(path.exists() if rank == 0 else None):
        return  # killed between this file and the stage's manifest
    first: int = share(_keep_whole_blocks(partial, block_size) if rank == 0 else None)
    if first:
        say(f"[generate] {first:,} of {num_prompts:,} answers are there")
    for start in range(first, num_prompts, block_size):
        rows = answer(start, min(start + block_size, num_prompts))
        if rank == 0:
            _append(partial, rows)
        say(f"[generate] {min(start + block_size, num_prompts):,} of {num_prompts:,} answers")
    if rank == 0:
        os.replace(partial, path)


def _keep_whole_blocks(partial: Path, block_size: int) -> int:
    """Cut the file behind its last whole block; returns how many answers are left."""
    if not partial.exists():
        return 0
    ends, at = [], 0
    with open(partial, "rb") as file:
        for line in file:
            at += len(line)
            if line.endswith(b"\n"):
                ends.append(at)
    kept = len(ends) // block_size * block_size
    with open(partial, "r+b") as file:
        file.truncate(ends[kept - 1] if kept else 0)
        os.fsync(file.fileno())
    return kept


def _append(partial: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(partial, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
