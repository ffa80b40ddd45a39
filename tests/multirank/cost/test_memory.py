"""The planner's bytes of weights, gradients, optimizer and teacher are those that a real distillation holds."""

import dataclasses
from pathlib import Path

import pytest

from nemo_minitron.cost.memory import Step, training_memory
from tests.support.tiny_llama import LAYOUTS, NEMOTRON, SEQ_LENGTH, formed, open_samples, write_model, write_tokens

# Large enough that what the planner leaves out (Adam's step counters) is small.
STUDENT = dataclasses.replace(NEMOTRON, hidden_size=64, ffn_hidden_size=160)
TEACHER = dataclasses.replace(STUDENT, hidden_size=96, ffn_hidden_size=224, num_layers=4)
GLOBAL_BATCH, MICRO_BATCH = 8, 4
KINDS = ("weights", "gradients", "optimizer", "teacher")


def distill(rank, world_size, *, files, layout, bf16, distributed_optimizer):
    """A job: two steps of distillation, then the bytes of the storages that this rank holds, by kind."""
    from nemo_minitron.checkpoint.digest import read_checkpoint
    from nemo_minitron.config import OptimConfig, TrainConfig
    from nemo_minitron.distill.losses import LossWeights
    from nemo_minitron.distill.module import DistillationModule
    from nemo_minitron.distill.teacher import Placement, Teacher
    from nemo_minitron.training.budget import plan_phases
    from nemo_minitron.training.trainer import fit

    student, teacher = read_checkpoint(Path(files["student"])), read_checkpoint(Path(files["teacher"]))
    recipe = TrainConfig(global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, eval_every_steps=0,
                         precision="bf16-mixed" if bf16 else "32")
    with formed(layout) as degrees:
        placed = Teacher(teacher.arch, teacher.path, degrees, placement=Placement(precision="bf16" if bf16 else "32"))
        module = DistillationModule(
            teacher=placed, teacher_arch=teacher.arch, weights=LossWeights(kl=1.0, ce=0.0), arch=student.arch,
            checkpoint=student.path, layout=degrees, chunk_tokens=16, bf16=bf16)
        phases = plan_phases(2 * GLOBAL_BATCH * SEQ_LENGTH, [], recipe, seq_length=SEQ_LENGTH, dp=degrees.dp)
        fit(module, lambda length: open_samples(files["tokens"], seq_length=length), label="kd",
            directory=Path(files["out"]), phases=phases, layout=degrees, train=recipe,
            optim=OptimConfig(warmup_steps=1), seed=1, distributed_optimizer=distributed_optimizer,
            measure=lambda trained: {})
        return held(module)


def held(module):
    """Bytes by kind; storages that two tensors share count once, and for the first kind."""
    chunks, (wrapped,) = module.trainer.strategy.megatron_parallel, module.trainer.strategy.optimizers
    megatron = wrapped.mcore_optimizer
    optimizers = [part.optimizer for part in getattr(megatron, "chained_optimizers", [megatron])]
    masters = [parameter for one in optimizers for group in one.param_groups for parameter in group["params"]]
    states = [value for one in optimizers for state in one.state.values() for value in state.values()]
    kinds = {
        "weights": list(module.parameters()),
        "gradients": [buffer.grad_data for chunk in chunks for buffer in chunk.buffers],
        "optimizer": [*masters, *states],
        "teacher": list(module.teacher.model.parameters()),
    }
    seen, found = set(), dict.fromkeys(kinds, 0)
    for kind, tensors in kinds.items():
        for tensor in tensors:
            if hasattr(tensor, "untyped_storage") and tensor.untyped_storage().data_ptr() not in seen:
                seen.add(tensor.untyped_storage().data_ptr())
                found[kind] += tensor.untyped_storage().nbytes()
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("memory")
    return {"tokens": str(write_tokens(directory / "tokens")),
            "student": str(write_model(STUDENT, directory / "student")),
            "teacher": str(write_model(TEACHER, directory / "teacher", seed=2))}


@pytest.mark.parametrize(("layout", "bf16", "distributed_optimizer"), [
    ("1x1", False, False), ("1x1", True, False), ("tp2", False, False), ("tp2", True, False), ("pp2", True, False),
    ("dp2", True, True),
])
def test_predicted_bytes_are_held(files, rank_pool, tmp_path, layout, bf16, distributed_optimizer):
    given = files | {"out": str(tmp_path)}
    ranks = rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:distill", files=given, layout=layout, bf16=bf16,
                                                      distributed_optimizer=distributed_optimizer)
    step = Step(seq_length=SEQ_LENGTH, global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, bf16=bf16,
                distributed_optimizer=distributed_optimizer)
    memory = training_memory(STUDENT, LAYOUTS[layout], step, teacher=TEACHER)
    fullest = ranks[memory.stage] if layout == "pp2" else ranks[0]
    predicted = {kind: getattr(memory, kind) for kind in KINDS}
    if layout == "pp2" and memory.stage == 1:  # the states of two micro-batches, which are gone after the step
        predicted["teacher"] -= 2 * MICRO_BATCH * SEQ_LENGTH * TEACHER.hidden_size * 2
    assert fullest == pytest.approx(predicted, rel=0.05)
