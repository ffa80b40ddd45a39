"""Training through NeMo's trainer gives the same losses and weights under every layout, and after an interruption."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from tests.support.checkpoints import read_llama
from tests.support.tiny_llama import (
    LAYOUTS,
    MORE_LAYOUTS,
    NEMOTRON,
    QWEN2,
    QWEN3,
    SEQ_LENGTH,
    TIED,
    UNEVEN,
    UNTIED,
    formed,
    open_documents,
    open_samples,
    write_documents,
    write_model,
    write_tokens,
)

STEPS, GLOBAL_BATCH = 6, 8
RESUME_AT, INTERRUPT_AT = 3, 4
TEACHER = dataclasses.replace(UNTIED, num_layers=2, hidden_size=48, ffn_hidden_size=80)
STUDENTS = {"tied": TIED, "untied": UNTIED, "uneven": UNEVEN, "qwen2": QWEN2, "qwen3": QWEN3, "nemotron": NEMOTRON}
RELATIONS = {"state": "attention", "teacher_layer": 1, "student_layer": 2}
TOLERANCE = 1e-5


class Interrupted(Exception):
    """What ends a run in the middle."""


def train(rank, world_size, *, files, layout, kinds, save=False, interrupt=False, teacher=None, terms=(), train=None,
          phases=(), alpha=None, arriving=(), packed=False):
    """A job: train `files["student"]` once for each of `kinds`, in turn; the results go to `files["out"]`/kind.

    With `save`, there is a resume point after step 3; with `interrupt`, the run ends in an exception after step 4.
    `teacher` places it, `terms` are of the intermediate losses, `train` and `phases` change the recipe. `arriving` are
    snapshots of the teacher: the n-th comes to `out`/snapshots when the held-out loss is measured for the n-th time.
    With `packed`, samples are of whole documents.
    """
    from nemo_minitron.config import OptimConfig, PhaseConfig, ProfileConfig, StopConfig, TrainConfig
    from nemo_minitron.training.budget import plan_phases
    from nemo_minitron.training.snapshots import ExchangeTeacher
    from nemo_minitron.training.trainer import export, fit

    changed = dict(train or {})
    recipe = TrainConfig(**{"global_batch_size": GLOBAL_BATCH, "micro_batch_size": 4, "log_every_steps": 100,
                            "eval_every_steps": 2, "checkpoint_every_steps": RESUME_AT if save else 100,
                            "chunk_tokens": 24, **{key: value for key, value in changed.items() if key != "tokens"},
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
                if kind == "kd":
                    module.teacher.close()
            keep(module, out / kind / "checkpoint")
            facts[kind] = {"tokens": trained.tokens, "steps": trained.steps, "best": trained.best_step,
                           **_held_by_training(module)}
    return facts


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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("layouts")
    return {
        "directory": directory, "tokens": str(write_tokens(directory / "tokens")),
        "teacher": str(write_model(TEACHER, directory / "teacher", seed=2)),
        **{name: str(write_model(arch, directory / name)) for name, arch in STUDENTS.items()},
    }


@pytest.fixture(scope="module")
def trained(files, rank_pool):
    """`trained(layout, name)`: folder and ranks' facts of CE, then distillation, of `tied` or `untied`; run once."""
    done = {}

    def get(layout, name="tied"):
        if (layout, name) not in done:
            out = files["directory"] / f"{layout} {name}"
            done[layout, name] = run(files, rank_pool, layout, name, ["ce", "kd"], out)
        return done[layout, name]

    return get


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


def test_the_reference_learns(files, trained):
    """At 1x1: the comparisons below are about a training in which something happens."""
    out, _ = trained("1x1")
    before = read_llama(Path(files["tied"]))
    for kind in ("ce", "kd"):
        steps, looks = lines(out, kind)
        assert looks[STEPS] < looks[2] - 0.01
        assert steps[1]["lr"] != steps[2]["lr"] and all(step["grad_norm"] > 0.5 for step in steps.values())
        after = read_llama(out / kind / "checkpoint")
        assert all((after[name] - tensor).abs().max() > 1e-3 for name, tensor in before.items())
    assert "kl" in lines(out, "kd")[0][1]


@pytest.mark.parametrize("kind", ["ce", "kd"])
@pytest.mark.parametrize(("layout", "name"), [
    ("tp2", "tied"), ("pp2", "tied"), ("tp2 sp", "tied"), ("dp2", "tied"), ("tp2 pp2", "tied"), ("tp2 pp2", "untied"),
    ("pp2", "uneven"), ("tp2", "qwen2"), ("tp2", "qwen3"), ("tp2 sp", "qwen3"), ("tp2 sp", "nemotron"),
])
def test_every_layout_trains_alike(trained, layout, name, kind):
    out, _ = trained(layout, name)
    expected, _ = trained("1x1", name)
    assert_same_numbers(out, expected, kind)
    assert_same_weights(out, expected, kind)


@pytest.fixture(scope="module")
def packed(files, rank_pool):
    """`packed(layout, teacher_layout)`: folder of a distillation on packed documents, attention's relations too."""
    write_documents(files["directory"] / "documents")

    def get(layout, teacher_layout=None):
        out = files["directory"] / f"packed {layout} {teacher_layout}"
        teacher = {} if teacher_layout is None else {"layout": teacher_layout}
        if not out.exists():
            run({**files, "tokens": str(files["directory"] / "documents")}, rank_pool, layout, "tied", ["kd"], out,
                packed=True, teacher=teacher, terms=[RELATIONS])
        return out

    return get


@pytest.mark.parametrize(("layout", "teacher_layout"), [("tp2 sp", None), ("dp2", None), ("tp2 pp2", None),
                                                        ("dp2", "tp2"), ("tp2", "pp2")])
def test_on_packed_documents_every_layout_trains_alike(packed, layout, teacher_layout):
    """The denominator is the number of valid tokens, which differs from micro-batch to micro-batch."""
    assert_same_numbers(packed(layout, teacher_layout), packed("1x1"), "kd")
    assert_same_weights(packed(layout, teacher_layout), packed("1x1"), "kd")
    tokens = [step["tokens"] for step in lines(packed("1x1"), "kd")[0].values()]
    places = GLOBAL_BATCH * SEQ_LENGTH
    assert all(0.5 * places * step < count < places * step for step, count in enumerate(tokens, 1))


def test_trainings_in_one_worker_do_not_disturb_each_other(files, trained, rank_pool):
    """Distillation alone, and after another training in the same job, gives the same bits."""
    after, _ = trained("1x1")
    alone, _ = run(files, rank_pool, "1x1", "tied", ["kd"], files["directory"] / "alone")
    assert_same_numbers(alone, after, "kd", tolerance=0)
    assert_same_weights(alone, after, "kd", tolerance=0)


@pytest.fixture(scope="module")
def interrupted(files, rank_pool):
    """`interrupted(layout, out)`: a distillation that ended after step 4 of 6, with a resume point after step 3."""

    def get(layout, out, name="tied"):
        _, facts = run(files, rank_pool, layout, name, ["kd"], out, save=True, interrupt=True)
        assert facts[0] == {} and not (out / "kd" / "checkpoint").exists()
        assert list(lines(out, "kd")[0]) == list(range(1, INTERRUPT_AT + 1))
        return out

    return get


@pytest.mark.parametrize("layout", ["1x1", "tp2"])
def test_an_interrupted_training_goes_on_to_the_same_bits(files, trained, interrupted, rank_pool, tmp_path, layout):
    out = interrupted(layout, tmp_path / "out")
    _, facts = run(files, rank_pool, layout, "tied", ["kd"], out, save=True)
    whole, whole_facts = trained(layout)
    assert facts[0]["kd"]["tokens"] == whole_facts[0]["kd"]["tokens"] == STEPS * GLOBAL_BATCH * SEQ_LENGTH
    assert_same_numbers(out, whole, "kd", tolerance=0)
    assert_same_weights(out, whole, "kd", tolerance=0)


@pytest.mark.parametrize(("layout", "other", "name"), [("tp2", "pp2", "tied"), ("pp2", "tp2", "uneven"),
                                                       ("tp2", "dp2", "tied")])
def test_a_resume_point_can_be_read_under_another_layout(files, trained, interrupted, rank_pool, tmp_path, layout,
                                                         other, name):
    """TP 2 pads the vocabulary of 101 to 102 rows, PP 2 does not."""
    out = interrupted(layout, tmp_path / "out", name)
    run(files, rank_pool, other, name, ["kd"], out, save=True)
    whole, _ = trained("1x1", name)
    assert_same_numbers(out, whole, "kd")
    assert_same_weights(out, whole, "kd")


def test_the_teacher_is_no_part_of_the_training(trained):
    """Optimizer, gradient buffers and module hold the student's parameters and no more."""
    _, (facts,) = trained("1x1")
    for kind in ("ce", "kd"):
        held = {name: facts[kind][name] for name in ("optimizer", "buffers", "module")}
        assert held == dict.fromkeys(held, TIED.num_parameters()), kind


def test_the_teacher_is_not_in_the_resume_point(interrupted, tmp_path):
    """Three tensors for each of the student's parameters: itself and Adam's two moments."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    out = interrupted("1x1", tmp_path / "out")
    (point,) = (out / "kd" / "resume").glob("step_*")
    sizes = [math.prod(tensor.global_shape) for tensor in load_tensors_metadata(str(point)).values()]
    assert sum(sizes) == 3 * TIED.num_parameters()
