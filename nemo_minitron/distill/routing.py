"""Which rank sends which of the teacher's states to whom, where teacher and student are laid out differently.

Pure. A step has `dp * M` micro-batches, numbered `n = d * M + m` over the student's replicas d and their M
micro-batches. The teacher's replicas share them in contiguous parts, so that with equal layouts every rank computes
its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping

from nemo_minitron.parallel.layout import Layout

FINAL = "final"
"""The item that goes from the teacher's last pipeline stage to the student's: the final hidden state."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """`item` of micro-batch `number` goes from global rank `source` to global rank `destination` (maybe the same)."""

    item: Hashable
    number: int
    source: int
    destination: int


def rank_of(layout: Layout, *, tp: int, dp: int, pp: int) -> int:
    """Global rank of a place in the layout; ranks count through tp first, then dp, then pp, as Megatron's do."""
    return tp + layout.tp * (dp + layout.dp * pp)


def share(total: int, layout: Layout, dp_rank: int) -> list[int]:
    """Numbers of the micro-batches that replica `dp_rank` runs: equally many for each, -1 where nothing is left."""
    size = -(-total // layout.dp)
    return [number if number < total else -1 for number in range(dp_rank * size, (dp_rank + 1) * size)]


def transfers(teacher: Layout, student: Layout, *, num_microbatches: int,
              stages: Mapping[Hashable, tuple[int, int]]) -> list[Transfer]:
    """All transfers of a step, in one order for all ranks.

    Args:
        teacher: the teacher's layout.
        student: the student's, of as many ranks.
        num_microbatches: M, of one replica of the student.
        stages: item -> (the teacher's pipeline stage that has it, the student's that needs it).

    Every TP rank of the stage that needs an item gets it: from itself where it has it, else from the TP rank of its own
    number, counted round.
    """
    found = []
    total = student.dp * num_microbatches
    owner = {number: replica for replica in range(teacher.dp) for number in share(total, teacher, replica)}
    for number in range(total):
        for item, (teacher_stage, student_stage) in stages.items():
            sources = [rank_of(teacher, tp=tp, dp=owner[number], pp=teacher_stage) for tp in range(teacher.tp)]
            for tp in range(student.tp):
                destination = rank_of(student, tp=tp, dp=number // num_microbatches, pp=student_stage)
                source = destination if destination in sources else sources[tp % teacher.tp]
                found.append(Transfer(item=item, number=number, source=source, destination=destination))
    return found
