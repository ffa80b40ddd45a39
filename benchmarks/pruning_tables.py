"""Held-out loss right after pruning, for every way of ranking: the tables of docs/pruning.md.

    python benchmarks/pruning_tables.py experiment=demo
    python benchmarks/pruning_tables.py teacher.path=DIR data=stories data.path=TEXT \\
           prune.target.hidden_size=48 prune.target.ffn_hidden_size=120

The arguments are a recipe's; its target is what widths are cut to. One calibration pass (and one scan without layers)
serves all rows. Nothing is trained. It prints the tables in Markdown and writes JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.parallel.cpu import open_cpu_door

open_cpu_door()  # before Megatron is imported

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from nemo_minitron.arch import ArchSpec  # noqa: E402
from nemo_minitron.artifacts import Plan, write_json  # noqa: E402
from nemo_minitron.compose import load_config  # noqa: E402
from nemo_minitron.data.batch import Samples  # noqa: E402
from nemo_minitron.evaluate.loss import heldout_loss  # noqa: E402
from nemo_minitron.importance.aggregate import BATCH_AGGREGATIONS, Ranking  # noqa: E402
from nemo_minitron.importance.baselines import magnitude, random_importance  # noqa: E402
from nemo_minitron.importance.depth import scan_depth  # noqa: E402
from nemo_minitron.importance.hooks import collect_scores  # noqa: E402
from nemo_minitron.importance.scores import SEQUENCE_STATISTICS, Scores  # noqa: E402
from nemo_minitron.model.build import load_model, transformer_config  # noqa: E402
from nemo_minitron.parallel import groups  # noqa: E402
from nemo_minitron.parallel.layout import Layout  # noqa: E402
from nemo_minitron.prune.plan import LayerChoice, make_plan  # noqa: E402
from nemo_minitron.prune.surgery import prune_checkpoint  # noqa: E402
from nemo_minitron.stages.context import Context  # noqa: E402
from nemo_minitron.stages.data import prepared_data, split_samples  # noqa: E402
from nemo_minitron.stages.targets import resolved_target, sizes_of  # noqa: E402

LAYOUT, RANDOM_SEEDS, DROPPED = Layout(), (1, 2, 3), (1, 2)


def collect(context: Context, path: Path, arch: ArchSpec, samples: Samples) -> tuple[Scores, Scores]:
    """Everything that any row needs: a pass with each measure, and the scan without layers."""
    config = context.config.importance
    ids = samples.calibration_ids(config.num_samples, context.config.seed)
    model = load_model(arch, path, transformer_config(arch, LAYOUT), unfused_norms=True)
    parts = [collect_scores(model, samples, ids, layout=LAYOUT, micro_batch_size=config.micro_batch_size,
                            source_digest="", **chosen)
             for chosen in ({}, {"neurons": "pre_activation", "heads": "tokens"})]
    scan = scan_depth(model, samples, ids[: config.depth.num_samples], layout=LAYOUT, metrics=["loss", "logit_mse"],
                      micro_batch_size=config.micro_batch_size, block_lengths=DROPPED, iterative=True)
    static = {**magnitude(path, arch), **scan.tensors}
    return dataclasses.replace(parts[0], tensors={**parts[0].tensors, **static}), parts[1]


def width_rows(arch: ArchSpec, sizes: dict[str, int], scores: Scores, before: Scores) -> Iterator[tuple[str, Plan]]:
    for batch, sequence in itertools.product(BATCH_AGGREGATIONS, SEQUENCE_STATISTICS):
        yield f"batch {batch}, sequence {sequence}", make_plan(arch, sizes, scores,
                                                               ranking=Ranking(batch=batch, sequence=sequence))
    yield "neurons before the activation", make_plan(arch, sizes, before)
    yield "all three norms", make_plan(arch, sizes, scores, ranking=Ranking(norms=("input", "pre_mlp", "final")))
    yield "layer scores summed", make_plan(arch, sizes, scores, ranking=Ranking(ranking="summed"))
    yield "magnitude", make_plan(arch, sizes, scores, ranking=Ranking(method="magnitude"))
    for seed in RANDOM_SEEDS:
        random = dataclasses.replace(scores, tensors=random_importance(arch, seed))
        yield f"random, seed {seed}", make_plan(arch, sizes, random, ranking=Ranking(method="random"))


def depth_rows(arch: ArchSpec, scores: Scores) -> Iterator[tuple[str, Plan]]:
    for dropped in DROPPED:
        for by in ("block_influence", "loss", "logit_mse", "removal_order"):
            for contiguous in (False, True):
                if by == "removal_order" and contiguous:
                    continue
                plan = make_plan(arch, {"num_layers": arch.num_layers - dropped}, scores,
                                 layers=LayerChoice(by=by, contiguous=contiguous))
                gone = [layer for layer in range(arch.num_layers) if layer not in plan.layers]
                yield f"{dropped} by {by}{', contiguous' if contiguous else ''} (layers {gone})", plan


def main() -> None:
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("out=")]
    out = next((argument[4:] for argument in sys.argv[1:] if argument.startswith("out=")),
               "outputs/benchmarks/pruning_tables.json")
    context = Context(config=load_config(overrides))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups.start(LAYOUT, timeout_s=600)
    torch.set_grad_enabled(False)
    teacher = context.teacher()
    prepared = prepared_data(context, teacher.path, teacher.arch)
    calibration = split_samples(context, prepared, "calibration", teacher.arch)
    scores, before = collect(context, teacher.path, teacher.arch, calibration)
    heldout = split_samples(context, prepared, "heldout", teacher.arch)

    def loss(path: Path, arch: ArchSpec) -> float:
        model = load_model(arch, path, transformer_config(arch, LAYOUT))
        return heldout_loss(model, heldout, layout=LAYOUT, micro_batch_size=16).loss

    sizes = sizes_of(resolved_target(teacher.arch, context.config.prune))
    tables = {"widths": width_rows(teacher.arch, sizes, scores, before), "depth": depth_rows(teacher.arch, scores)}
    found: dict[str, dict[str, float]] = {"whole": {"teacher": loss(teacher.path, teacher.arch)}}
    print(f"teacher {found['whole']['teacher']:.4f} nats/token", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for table, rows in tables.items():
            print(f"\n| {table} | held-out loss |\n|---|---|", flush=True)
            found[table] = {}
            for name, plan in rows:
                prune_checkpoint(teacher.path, plan, Path(directory) / "pruned")
                found[table][name] = loss(Path(directory) / "pruned", plan.target)
                print(f"| {name} | {found[table][name]:.3f} |", flush=True)
    write_json(Path(out), {"cases": found, "command": sys.argv})
    groups.stop()


if __name__ == "__main__":
    main()
