"""A recipe as the planner sees it: architectures, tokens, a step's shape, a layout and a GPU. Pure data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from nemo_minitron.arch import ArchSpec
from nemo_minitron.cost.hardware import Gpu
from nemo_minitron.cost.memory import Step
from nemo_minitron.parallel.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """An architecture and what it is called in the recipe."""

    name: str
    arch: ArchSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Candidates of a round; `ruled_out` as in `search.space.Enumeration`.

    `num_finalists` of them are distilled on `tokens` tokens, the others (successive halving) on a part of these;
    `steps` are those of all candidates together.
    """

    num_combinations: int
    ruled_out: Mapping[str, int]
    candidates: tuple[ArchSpec, ...]
    tokens: int
    steps: int
    num_finalists: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """`student` is pruned from `source` and distilled from `teacher` on `tokens` tokens."""

    name: str
    source: Model
    teacher: Model
    student: Model
    tokens: int
    search: Search | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """Training from scratch that the recipe is compared with."""

    name: str
    tokens: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that costs depend on. `score_samples` and `correct_tokens` are 0 where there is no such stage."""

    name: str
    teacher: Model
    rounds: tuple[Round, ...]
    step: Step
    layout: Layout
    gpu: Gpu
    utilisation: float
    controls: tuple[str, ...] = ()
    """Trainings of every round's student without a teacher, on the same tokens."""
    scratch_ratio: float = 10.0
    """But `scratch_until` is counted with this many times the tokens, its most."""
    cached: bool = False
    """The teacher's likeliest tokens are read from disk: no teacher in the step."""
    writes_cache: bool = False
    aligned: tuple[tuple[int, Step], ...] = ()
    """Tokens and step of every training that the alignment of a round's student has."""
    correct_tokens: int = 0
    score_samples: int = 0
    score_micro_batch: int = 1
    baseline: Baseline | None = None

    def models(self) -> list[Model]:
        """The teacher, and every round's student."""
        return [self.teacher, *(round_.student for round_ in self.rounds)]

    def streamed(self, round_: Round) -> ArchSpec | None:
        """The teacher that runs in the steps of a round, if one does."""
        return None if self.cached else round_.teacher.arch

    def trainings(self) -> Iterator[tuple[ArchSpec, ArchSpec | None]]:
        """Every (student, teacher) that is trained, the largest candidate of a search for all of them."""
        if self.correct_tokens:
            yield self.teacher.arch, None
        for round_ in self.rounds:
            if round_.search is not None:
                yield max(round_.search.candidates, key=ArchSpec.num_parameters), self.streamed(round_)
            yield round_.student.arch, self.streamed(round_)
