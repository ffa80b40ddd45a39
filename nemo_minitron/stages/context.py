"""What a stage is given: the recipe, where artifacts lie, and this process's place among the ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import Checkpoint, Manifest
from nemo_minitron.checkpoint.digest import read_checkpoint
from nemo_minitron.config import Config
from nemo_minitron.errors import ConfigError
from nemo_minitron.parallel.layout import Layout

ROUND = "round1"
"""Name of the round of a recipe that lists none: results are in `outputs/NAME/round1/STAGE`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Paths and checkpoints of a run, and how its ranks keep together.

    `rank` is the global rank, 0 outside of a worker. `share` gives every rank what rank 0 passes to it, and
    `barrier` waits for all ranks, as long as rank 0 may work alone; both do nothing where one process runs.
    `command` is what the user typed. `inside` is told on every rank which stage it is in.

    `part` is the folder under `outputs/NAME` that stages are in: a round's, or a candidate's within a search; those in
    `elsewhere` are in another. `source` is the model that is scored and pruned, `own_teacher` the one that is distilled
    from (None: the recipe's teacher). `round_names` are all rounds of the run. A training stage goes no further than
    `pause_step`, where there is one, and is not finished then. `looks_count`: what is read of a training stage are its
    looks at held-out data, so that its result depends on how many there are.
    """

    config: Config
    rank: int = 0
    share: Callable[[Any], Any] = lambda value: value
    barrier: Callable[[], None] = lambda: None
    command: str = ""
    inside: Callable[[str], AbstractContextManager[None]] = lambda stage: nullcontext()
    part: str = ROUND
    elsewhere: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: Path | None = None
    own_teacher: Path | None = None
    round_names: tuple[str, ...] = (ROUND,)
    pause_step: int | None = None
    looks_count: bool = False

    @property
    def round_dir(self) -> Path:
        """`outputs/NAME/round1`, or another part of the run."""
        return self.config.run_dir / self.part

    @property
    def data_dir(self) -> Path:
        """Token files, shared by all runs under one `output_dir`."""
        return Path(self.config.output_dir) / "data"

    @property
    def layout(self) -> Layout:
        """The parallel layout of the recipe."""
        parallel = self.config.parallel
        return Layout(tp=parallel.tp, pp=parallel.pp, dp=parallel.dp, sequence_parallel=parallel.sequence_parallel,
                      read_once=parallel.read_once)

    def stage_dir(self, stage: str) -> Path:
        """Directory of a stage."""
        return self.config.run_dir / self.elsewhere.get(stage, self.part) / stage

    def manifest(self, stage: str) -> Manifest | None:
        """The record of a finished stage, or None."""
        return Manifest.read(self.stage_dir(stage))

    def teacher_path(self) -> Path:
        """The directory of the model whose logits are distilled: an earlier round's, or the recipe's teacher.

        Raises:
            ConfigError: there is none.
        """
        return self.original_path() if self.own_teacher is None else self.own_teacher

    def source_path(self) -> Path:
        """The directory of the model that is scored and pruned: an earlier round's student, or the recipe's teacher."""
        return self.original_path() if self.source is None else self.source

    def original_path(self) -> Path:
        """The recipe's teacher: what it trains or makes, else `teacher.path`.

        Raises:
            ConfigError: neither is there.
        """
        return self.stage_dir("correct") / "checkpoint" if "correct" in self.config.stages else self.start_path()

    def start_path(self) -> Path:
        """The model before any correction: the random weights of `initialize`, or `teacher.path`.

        Raises:
            ConfigError: neither is there.
        """
        if "initialize" in self.config.stages:
            return self.stage_dir("initialize") / "checkpoint"
        if self.config.teacher.path is None:
            raise ConfigError("no teacher", expected="a Hugging Face directory", found="null", key="teacher.path")
        return Path(self.config.teacher.path)

    def scores_path(self) -> Path:
        """Folder of the scores that `prune` reads: `prune.scores`, else those of the stage `score`."""
        scores = self.config.prune.scores
        return self.stage_dir("score") if scores is None else Path(scores)

    def read(self, path: Path) -> Checkpoint:
        """The checkpoint in `path`; rank 0 reads all of its bytes for the digests, and every rank gets the result."""
        found: Checkpoint = self.share(read_checkpoint(path) if self.rank == 0 else None)
        return found

    def teacher(self) -> Checkpoint:
        """The model whose logits are distilled; every rank of the stage must call this."""
        return self.read(self.teacher_path())

    def source_model(self) -> Checkpoint:
        """The model that is scored and pruned; every rank of the stage must call this."""
        return self.read(self.source_path())

    def student(self) -> Checkpoint:
        """The pruned model; every rank of the stage must call this."""
        return self.read(self.stage_dir("prune") / "checkpoint")

    def check_seq_length(self, arch: ArchSpec) -> None:
        """Raise `ConfigError` for samples longer than the model's context."""
        seq_length = max([self.config.data.seq_length,
                          *(phase.seq_length or 0 for phase in self.config.distill.phases)])
        if seq_length > arch.max_position_embeddings:
            raise ConfigError("samples are longer than the model's context",
                              expected=f"at most {arch.max_position_embeddings} tokens", found=str(seq_length),
                              key="data.seq_length or distill.phases")
        if arch.sliding_window is not None and seq_length > arch.sliding_window:
            raise ConfigError("samples are longer than the sliding window that the model attends to",
                              expected=f"at most {arch.sliding_window} tokens", found=str(seq_length),
                              key="data.seq_length")

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def config_part(self, *nodes: str) -> dict[str, Any]:
        """Plain data of the named nodes, for fingerprints."""
        whole = self.config.to_dict()
        return {node: whole[node] for node in nodes}
