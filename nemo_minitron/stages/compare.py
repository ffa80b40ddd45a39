"""Stage `compare`: the candidate that looked best right after pruning gets the same distillation as the chosen one."""

from __future__ import annotations

from typing import Any

from nemo_minitron.artifacts import read_json
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.execute import execute
from nemo_minitron.stages.registry import due_stages
from nemo_minitron.stages.rounds import compared_context


def run(context: Context) -> dict[str, Any]:
    """Prune, distil and measure it in `compare/STAGE`; every rank takes part. Nothing to do where it was chosen."""
    found = read_json(context.stage_dir("search") / "ranking.json")
    chosen, other = found["chosen"]["name"], found["best_after_pruning"]
    if other["name"] == chosen:
        context.say(f"[compare] {chosen} was best right after pruning too: nothing to compare")
        return {"chosen": chosen, "candidate": chosen, "loss": None}
    inner = compared_context(context, other["sizes"])
    execute(inner, inner.share(due_stages(inner) if inner.rank == 0 else None))
    loss = inner.share(read_json(inner.stage_dir("evaluate") / "distilled.json")["loss"] if inner.rank == 0 else None)
    context.say(f"[compare] {other['name']}, best right after pruning: {loss:.4f} nats/token after the same steps")
    return {"chosen": chosen, "candidate": other["name"], "loss": loss}
