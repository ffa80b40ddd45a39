"""The candidates of a search as they lie on disk: which there are, how far each is, who goes on. No torch."""

from __future__ import annotations

import dataclasses

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import held_out_looks, read_json
from nemo_minitron.checkpoint.families import read_arch
from nemo_minitron.config import Config
from nemo_minitron.errors import UserError
from nemo_minitron.search import ranking
from nemo_minitron.search.recipe import candidates_of
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.execute import has_begun
from nemo_minitron.stages.registry import due_stages
from nemo_minitron.stages.rounds import candidate_context, search_steps
from nemo_minitron.stages.targets import sizes_of
from nemo_minitron.training.resume import sealed_points


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """All candidates of a round, in the order of the space.

    `contexts` are their recipes, by name like `archs`. `ends` is the step up to which each rung trains, ascending;
    `keep` is the fraction that goes on to the next.
    """

    archs: dict[str, ArchSpec]
    contexts: dict[str, Context]
    num_combinations: int
    ends: tuple[int, ...]
    keep: float

    def at_rung(self, rung: int) -> list[str]:
        """Names of those that are trained at a rung (from 0), by what the rungs before came to.

        Raises:
            UserError: a candidate is not through one of these.
        """
        names = list(self.archs)
        for earlier, end in enumerate(self.ends[:rung]):
            if lacking := [name for name in names if not self.is_through(name, earlier)]:
                raise UserError("the rung before is not finished", expected=f"{len(names)} candidates at step {end}",
                                found=f"{len(lacking)} that are not, {lacking[0]} first")
            kept = ranking.survivors([self.loss(name, end) for name in names], self.keep)
            names = [names[index] for index in kept]
        return names

    def is_through(self, name: str, rung: int) -> bool:
        """Whether a candidate has been trained up to the end of a rung, by this very recipe."""
        context, last = self.contexts[name], rung == len(self.ends) - 1
        due = due_stages(context)
        if due != ["distill"] or last:
            return not due
        # another job may be training it further: where its resume points are gone, it has been finished meanwhile
        return has_reached(context, self.ends[rung]) or not due_stages(context)

    def loss(self, name: str, end: int) -> float:
        """Held-out loss at the last look up to step `end`, nats/token; right after pruning where there is none."""
        context = self.contexts[name]
        looks = curve(context, end)
        return looks[-1][2] if looks else float(read_json(context.stage_dir("prune") / "loss.json")["loss"])


def candidates_in(context: Context) -> Candidates:
    """The candidates of a round whose recipe has a search."""
    search = context.config.search
    found = candidates_of(read_arch(context.source_path()), search)
    archs = {ranking.candidate_name(arch): arch for arch in found.candidates}
    contexts = {name: candidate_context(context, name, sizes_of(arch)) for name, arch in archs.items()}
    ends = ranking.rung_steps(search_steps(context.config), rungs=search.rungs, keep=search.keep)
    return Candidates(archs=archs, contexts=contexts, num_combinations=found.num_combinations, ends=ends,
                      keep=search.keep)


def rung_sizes(config: Config, source: ArchSpec) -> list[int]:
    """How many candidates each rung of the recipe's search trains, before anything is trained."""
    search, count = config.search, len(candidates_of(source, config.search).candidates)
    ends = ranking.rung_steps(search_steps(config), rungs=search.rungs, keep=search.keep)
    sizes = [count]
    while len(sizes) < len(ends):
        sizes.append(ranking.num_survivors(sizes[-1], search.keep))
    return sizes


def has_reached(context: Context, end: int) -> bool:
    """Whether a candidate was paused at step `end`, or later, by this very recipe."""
    points = sealed_points(context.stage_dir("distill") / "resume")
    return has_begun(context, "distill") and bool(points) and points[0].step >= end


def curve(context: Context, end: int) -> tuple[tuple[int, int, float], ...]:
    """(step, tokens, held-out loss) of a candidate's looks up to step `end`; another job may be writing further on."""
    return tuple(look for look in held_out_looks(context.stage_dir("distill")) if look[0] <= end)
