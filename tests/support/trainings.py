"""Short trainings of tiny models through NeMo's trainer, as jobs of a `RankPool`, and how results are compared."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest

from tests.support.checkpoints import read_llama
from tests.support.tiny_llama import (
    LAYOUTS,
    MORE_LAYOUTS,
    SEQ_LENGTH,
    UNTIED,
    formed,
    open_documents,
    open_samples,
    write_model,
    write_tokens,
)

STEPS, GLOBAL_BATCH = 6, 8
RESUME_AT, INTERRUPT_AT = 3, 4
TEACHER = dataclasses.replace(UNTIED, num_layers=2, hidden_size=48, ffn_hidden_size=80)
TOLERANCE = 1e-5


class Interrupted(Exception):
    """What ends a run in the middle."""


def write_files(directory, **students):
    """Tokens, a teacher, and one model for each name and architecture; the paths by name."""
    return {"directory": directory, "tokens": str(write_tokens(directory / "tokens")),
            "teacher": str(write_model(TEACHER, directory / "teacher", seed=2)),
            **{name: str(write_model(arch, directory / name)) for name, arch in students.items()}}


def remembered(files, rank_pool, **defaults):
    """`run` that trains once for the same arguments: `get(layout, name, kinds, **options)` gives folder and facts."""
    done = {}

    def get(layout, name="tied", kinds=("kd",), **options):
        options = {**defaults, **options}
        key = layout, name, tuple(kinds), str(options)
        if key not in done:
            done[key] = run(files, rank_pool, layout, name, list(kinds), files["directory"] / f"{len(done)}", **options)
        return done[key]

    return get


def train(rank, world_size, *, files, layout, kinds, save=False, interrupt=False, teacher=None, terms=(), train=None,
          phases=(), alpha=None, arriving=(), packed=False, slow_writing=0.0):
    """A job: train `files["student"]` once for each of `kinds`, in turn; the results go to `files["out"]`/kind.

    With `save`, there is a resume point after step 3; with `interrupt`, the run ends in an exception after step 4.
    `teacher` places it, `terms` are of the intermediate losses, `train` and `phases` change the recipe. `arriving` are
    snapshots of the teacher: the n-th comes to `out`/snapshots when the held-out loss is measured for the n-th time.
    With `packed`, samples are of whole documents. Each rank waits `slow_writing` seconds before it writes its share of
    a resume point.
    """
    from nemo_minitron.config import OptimConfig, PhaseConfig, ProfileConfig, StopConfig, TrainConfig
    from nemo_minitron.training import writing
    from nemo_minitron.training.budget import plan_phases
    from nemo_minitron.training.snapshots import ExchangeTeacher
    from nemo_minitron.training.trainer import export, fit

    write = writing.Writing._write
    if slow_writing:
        writing.Writing._write = lambda self, arguments: (time.sleep(slow_writing), write(self, arguments))

    changed = dict(train or {})
    recipe = TrainConfig(**{"global_batch_size": GLOBAL_BATCH, "micro_batch_size": 4, "log_every_steps": 100,
                            "eval_every_steps": 2, "checkpoint_every_steps": RESUME_AT if save else 100,
                            "checkpoint_async": not interrupt, "chunk_tokens": 24,
                            **{key: value for key, value in changed.items() if key != "tokens"},
                            "stop": StopConfig(**changed.get("stop", {})),
                            "profile": ProfileConfig(**changed.get("profile", {}))})
    # A small eps would let Adam turn rounding errors of tiny gradients into steps of full size.
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, clip_grad=0.5, eps=1e-4)
    opened = open_documents if packed else open_samples
    samples = opened(files["tokens"])
    out = Path(files["out"])
    facts = {}
    with formed(layout) as degrees:
        for kind in kinds:
            module, base = _module(kind, files, degrees, recipe, teacher or {}, terms, alpha)
            looks = []

            def measure(trained, looks=looks):
                looks.append(trained.measure(samples, micro_batch_size=4, max_samples=6))
                if rank == 0 and len(looks) <= len(arriving):
                    shutil.copytree(arriving[len(looks) - 1], out / "snapshots" / f"step_{len(looks)}",
                                    dirs_exist_ok=True)
                if interrupt and len(looks) * 2 == INTERRUPT_AT:
                    raise Interrupted
                return looks[-1]

            def keep(module, directory, base=base, degrees=degrees):
                export(module, directory, base=base, layout=degrees)

            planned = plan_phases(changed.get("tokens", STEPS * GLOBAL_BATCH * SEQ_LENGTH),
                                  [PhaseConfig(**phase) for phase in phases], recipe, seq_length=SEQ_LENGTH,
                                  dp=degrees.dp)
            callbacks = [ExchangeTeacher(out / "snapshots", every_steps=1, record=out / "teachers.jsonl", label=kind)]
            try:
                trained = fit(
                    module, lambda length: opened(files["tokens"], seq_length=length), label=kind,
                    directory=out / kind, phases=planned, layout=degrees, train=recipe, optim=optim, seed=5,
                    distributed_optimizer=False, measure=measure, keep=keep, callbacks=callbacks if arriving else (),
                )
            except Interrupted:
                continue
            finally:
                writing.Writing._write = write
                if kind == "kd":
                    module.teacher.close()
            keep(module, out / kind / "checkpoint")
            facts[kind] = {"tokens": trained.tokens, "steps": trained.steps, "best": trained.best_step,
                           **_held_by_training(module)}
    return facts


def catches(rank, world_size, *, number):
    """A job: whether this process has a handler for a signal (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (mask,) = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")]
    return bool(mask >> (number - 1) & 1)


def _module(kind, files, degrees, recipe, teacher, terms, alpha):
    from nemo_minitron.checkpoint.digest import read_checkpoint
    from nemo_minitron.distill.intermediate import IntermediateLosses
    from nemo_minitron.distill.layer_map import Term
    from nemo_minitron.distill.losses import LossWeights
    from nemo_minitron.distill.module import DistillationModule
    from nemo_minitron.distill.teacher import Placement, Teacher
    from nemo_minitron.training.module import TrainingModule

    student, source = read_checkpoint(Path(files["student"])), read_checkpoint(Path(files["teacher"]))
    arguments = {"arch": student.arch, "checkpoint": student.path, "layout": degrees, "chunk_tokens": 12, "bf16": False,
                 "recompute": recipe.recompute}
    if kind == "ce":
        return TrainingModule(**arguments), student
    terms = [Term(**term) for term in terms]
    own = dict(teacher)
    if "layout" in own:
        own["layout"] = MORE_LAYOUTS[own["layout"]]
    placed = Teacher(source.arch, source.path, degrees, placement=Placement(**own), terms=terms,
                     student_layers=student.arch.num_layers)
    intermediate = IntermediateLosses(terms, alpha=alpha, relation_heads=2) if terms else None
    return DistillationModule(teacher=placed, teacher_arch=source.arch, weights=LossWeights(kl=0.7, ce=0.3),
                              intermediate=intermediate, **arguments), student


def _held_by_training(module):
    """Numbers of parameters: trained by the optimizer, in gradient buffers, in the Lightning module."""
    strategy = module.trainer.strategy
    (optimizer,) = strategy.optimizers
    return {
        "optimizer": sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"]),
        "buffers": sum(buffer.grad_data.numel() for chunk in strategy.megatron_parallel for buffer in chunk.buffers),
        "module": sum(parameter.numel() for parameter in module.parameters()),
    }



def run(files, rank_pool, layout, name, kinds, out, **options):
    arguments = {"tokens": files["tokens"], "teacher": files["teacher"], "student": files[name], "out": str(out)}
    facts = rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:train", files=arguments, layout=layout,
                                                      kinds=kinds, **options)
    return out, facts


def lines(out, kind):
    """Lines of steps (by step) and held-out losses (by step) of a training."""
    records = [json.loads(line) for line in (out / kind / "metrics.jsonl").read_text().splitlines()]
    steps = {record["step"]: record for record in records if "loss" in record}
    assert len(steps) == sum("loss" in record for record in records)
    return steps, {record["step"]: record["heldout_ce"] for record in records if "heldout_ce" in record}


def assert_same_numbers(out, expected_out, kind, tolerance=TOLERANCE):
    steps, looks = lines(out, kind)
    expected_steps, expected_looks = lines(expected_out, kind)
    assert list(steps) == list(expected_steps) == list(range(1, STEPS + 1))
    assert looks == pytest.approx(expected_looks, abs=tolerance) and list(looks) == [2, 4, 6]
    timings = {"seconds", "tokens_per_s", "tflops_per_s", "peak_memory_mib", "teacher_share"}
    for step, expected in expected_steps.items():
        numbers = {key: value for key, value in steps[step].items() if key not in timings}
        expected_numbers = {key: value for key, value in expected.items() if key not in timings}
        assert numbers == pytest.approx(expected_numbers, abs=tolerance), step


def assert_same_weights(out, expected_out, kind, tolerance=TOLERANCE):
    found, expected = (read_llama(folder / kind / "checkpoint") for folder in (out, expected_out))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance, name

