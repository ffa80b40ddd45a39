"""A distillation step against the sum of its parts, a bare Megatron-core loop, and a plain transformers loop.

    python benchmarks/kd_step.py            (or: make bench-kd_step)

Student and teacher are random Llamas of 8 layers (hidden 256 and 384, vocabulary 32,000); a step is two micro-batches
of 4 samples of 256 tokens, fp32, Adam. All sides of a comparison run in one process and take turns after a warm-up;
seconds are medians of the turns' steps.

- `step_over_parts`: the step with the teacher streamed in it over (teacher forward without its head, alone) + (student
  step with the same loss on teacher states computed before, alone); the worse of 1 process and TP 2.
- `nemo_overhead`: the step as NeMo's trainer drives it (meters and checkpoints as in a recipe), over the same step in a
  bare loop: Megatron's schedule, gradient buffers and optimizer around the same model and loss. 1 process.
- `vs_transformers`: tokens/s of the bare loop over those of a plain PyTorch loop on `transformers` models with full
  logits, `kl_div` and torch's Adam, the same weights, data and batch; `memory_vs_transformers`: peak resident bytes of
  a process of its own, above what it held before it built the models.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from depth_scan import random_samples  # opens the CPU door

# isort: split
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import write_json
from nemo_minitron.checkpoint.digest import write_random
from nemo_minitron.config import OptimConfig, TrainConfig
from nemo_minitron.data.batch import Batch, TokenSamples
from nemo_minitron.distill.losses import LossWeights
from nemo_minitron.distill.module import DistillationModule
from nemo_minitron.distill.teacher import Teacher
from nemo_minitron.distill.terms import TeacherStates, loss_terms
from nemo_minitron.model.build import load_model, transformer_config
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.layout import Layout

SEQ_LENGTH, MICRO_BATCH, NUM_MICRO_BATCHES = 256, 4, 2
TOKENS = SEQ_LENGTH * MICRO_BATCH * NUM_MICRO_BATCHES
STUDENT = ArchSpec(family="llama", num_layers=8, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8,
                   num_query_groups=4, head_dim=32, vocab_size=32000, tied_embeddings=False)
TEACHER = ArchSpec(family="llama", num_layers=8, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=12,
                   num_query_groups=4, head_dim=32, vocab_size=32000, tied_embeddings=False)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def checkpoints(directory: Path) -> dict[str, Path]:
    """Random Hugging Face directories of both."""
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    for seed, (name, arch) in enumerate((("student", STUDENT), ("teacher", TEACHER))):
        write_random(arch, directory / name, tokenizer_directory=directory / "tokenizer", seed=seed)
    return {name: directory / name for name in ("student", "teacher")}


class BareLoop:
    """Megatron's schedule, gradient buffers and optimizer around our model and loss; no NeMo."""

    def __init__(self, paths: dict[str, Path], layout: Layout) -> None:
        self.config = transformer_config(STUDENT, layout)
        self.teacher = Teacher(TEACHER, paths["teacher"], layout)
        student = load_model(STUDENT, paths["student"], self.config)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=True)
        self.model = DistributedDataParallel(self.config, ddp, student)
        self.student = student
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = None
        self.optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-4, clip_grad=1.0), [self.model])

    def states(self, batches: list[Batch]) -> list[Any]:
        """What the teacher hands over of each, alone."""
        return [self.teacher.hand_over(batch).logits for batch in batches]

    def step(self, batches: list[Batch], states: list[Any] | None = None) -> None:
        """One step; the teacher runs in it unless its `states` are given."""
        turn = iter(states or ())

        def forward(data: Any, model: Any) -> Any:
            batch = next(data)
            hidden = model(batch.tokens, batch.position_ids, None)
            said = next(turn) if states is not None else self.teacher.hand_over(batch).logits

            def loss(_: torch.Tensor) -> Any:
                terms = loss_terms(self.student, hidden, batch, weights=LossWeights(), teacher=said)
                return terms.loss_sum, terms.num_tokens, {"sums": terms.sums}

            return hidden, loss

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter(batches), model=[self.model],
            num_microbatches=len(batches), seq_length=SEQ_LENGTH, micro_batch_size=MICRO_BATCH, forward_only=False)
        self.optimizer.step()


class PlainLoop:
    """What a user would write: `transformers`, full logits, torch's Adam."""

    def __init__(self, paths: dict[str, Path]) -> None:
        from transformers import AutoModelForCausalLM

        self.student, self.teacher = (AutoModelForCausalLM.from_pretrained(paths[name], torch_dtype=torch.float32)
                                      for name in ("student", "teacher"))
        self.teacher.eval()
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=1e-4)

    def step(self, batches: list[Batch]) -> None:
        self.optimizer.zero_grad()
        for batch in batches:
            student = self.student(batch.tokens, use_cache=False).logits.float()
            with torch.no_grad():
                teacher = self.teacher(batch.tokens, use_cache=False).logits.float()
            kl = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum()
            (kl / TOKENS).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()


def batches_of(samples: TokenSamples) -> list[Batch]:
    return [samples.batch(range(first, first + MICRO_BATCH))
            for first in range(0, MICRO_BATCH * NUM_MICRO_BATCHES, MICRO_BATCH)]


def in_turns(sides: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each side, after one warm-up each."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def parts(rank: int, layout: Layout, folder: str, turns: int, threads: int) -> None:
    """A process of the comparison with the parts, and at 1 process of that with transformers; writes seconds."""
    torch.set_num_threads(threads)
    os.environ |= {"WORLD_SIZE": str(layout.world_size), "RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{layout.tp}", rank=rank,
                            world_size=layout.world_size)
    groups.start(layout, timeout_s=300)
    groups.seed_everything(1)
    paths = {name: Path(folder, name) for name in ("student", "teacher")}
    loop = BareLoop(paths, layout)
    with tempfile.TemporaryDirectory() as data:
        batches = batches_of(random_samples(Path(data), STUDENT, MICRO_BATCH * NUM_MICRO_BATCHES + 1, SEQ_LENGTH))
    known = loop.states(batches)
    assert all(isinstance(states, TeacherStates) for states in known)
    sides: dict[str, Callable[[], Any]] = {
        "step": lambda: loop.step(batches), "teacher": lambda: loop.states(batches),
        "student": lambda: loop.step(batches, known)}
    if layout.world_size == 1:
        plain = PlainLoop(paths)
        sides["transformers"] = lambda: plain.step(batches)
    seconds = in_turns(sides, turns)
    if rank == 0:
        Path(folder, f"tp{layout.tp}.json").write_text(json.dumps(seconds))
    groups.stop()


def nemo(rank: int, folder: str, turns: int, threads: int) -> None:
    """NeMo's trainer and the bare loop in one process, in blocks of as many steps; writes seconds per step."""
    from nemo_minitron.training.budget import plan_phases
    from nemo_minitron.training.trainer import fit

    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)  # NeMo announces itself at length
    dist.init_process_group("gloo", init_method=f"file://{folder}/store_nemo", rank=0, world_size=1)
    layout, paths = Layout(), {name: Path(folder, name) for name in ("student", "teacher")}
    groups.start(layout, timeout_s=300)
    train = TrainConfig(global_batch_size=MICRO_BATCH * NUM_MICRO_BATCHES, micro_batch_size=MICRO_BATCH,
                        eval_every_steps=0, checkpoint_every_steps=10_000)
    samples = random_samples(Path(folder), STUDENT, MICRO_BATCH * NUM_MICRO_BATCHES + 1, SEQ_LENGTH)
    batches = batches_of(samples)
    seconds: dict[str, list[float]] = {"nemo": [], "bare": []}
    for turn in range(turns + 1):
        module = DistillationModule(teacher=Teacher(TEACHER, paths["teacher"], layout), teacher_arch=TEACHER,
                                    weights=LossWeights(), arch=STUDENT, checkpoint=paths["student"], layout=layout,
                                    chunk_tokens=256, bf16=False)
        done = fit(module, lambda _: samples, label="nemo", directory=Path(folder, f"fit{turn}"),
                   phases=plan_phases(4 * TOKENS, [], train, seq_length=SEQ_LENGTH, dp=1), layout=layout, train=train,
                   optim=OptimConfig(warmup_steps=1), seed=1, distributed_optimizer=False, measure=lambda _: {})
        del module
        groups.form(layout, timeout_s=300)
        groups.seed_everything(1)
        loop = BareLoop(paths, layout)
        started = time.perf_counter()
        for _ in range(done.steps):
            loop.step(batches)
        if turn:
            seconds["nemo"].append(done.seconds / done.steps)
            seconds["bare"].append((time.perf_counter() - started) / done.steps)
    Path(folder, "nemo.json").write_text(json.dumps(seconds))


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def memory(which: str, folder: Path) -> int:
    """Peak of two steps above what the process held before it built the models."""
    import transformers  # noqa: F401  in both

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups.start(Layout(), timeout_s=300)
    groups.seed_everything(1)
    with tempfile.TemporaryDirectory() as data:
        batches = batches_of(random_samples(Path(data), STUDENT, MICRO_BATCH * NUM_MICRO_BATCHES + 1, SEQ_LENGTH))
    before = resident_bytes("VmRSS")
    paths = {name: folder / name for name in ("student", "teacher")}
    loop: Any = BareLoop(paths, Layout()) if which == "ours" else PlainLoop(paths)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        loop.step(batches)
    return resident_bytes("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="of one process; at TP 2 each has half of them")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/kd_step.json"))
    parser.add_argument("--child", nargs=2, metavar=("WHICH", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(memory(arguments.child[0], Path(arguments.child[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoints(Path(folder))
        for tp in (1, 2):
            layout = Layout(tp=tp)
            mp.spawn(parts, args=(layout, folder, arguments.turns, max(1, arguments.threads // tp)), nprocs=tp)
        mp.spawn(nemo, args=(folder, arguments.turns, arguments.threads), nprocs=1)
        peaks = {which: int(subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--child", which, folder, "--threads", str(arguments.threads)],
            check=True, capture_output=True, text=True, env=os.environ | GIVE_BACK).stdout.split()[-1])
            for which in ("ours", "transformers")}
        cases = {name: json.loads(Path(folder, f"{name}.json").read_text()) for name in ("tp1", "tp2", "nemo")}
    middle = {name: {side: statistics.median(values) for side, values in case.items()} for name, case in cases.items()}
    over_parts = {name: case["step"] / (case["teacher"] + case["student"])
                  for name, case in middle.items() if name != "nemo"}
    result = {"step_over_parts": max(over_parts.values()),
              "nemo_overhead": middle["nemo"]["nemo"] / middle["nemo"]["bare"],
              "vs_transformers": middle["tp1"]["transformers"] / middle["tp1"]["step"],
              "memory_vs_transformers": peaks["ours"] / peaks["transformers"]}
    for name, case in middle.items():
        print(f"{name:6}" + "   ".join(f"{side} {value:.3f} s" for side, value in case.items()))
    print("peak MiB: " + ", ".join(f"{which} {value / 2**20:.0f}" for which, value in peaks.items()))
    print(json.dumps(result))
    write_json(arguments.out, {**result, "over_parts": over_parts, "tokens_per_step": TOKENS, "peak_bytes": peaks,
                               "threads": arguments.threads, "cases": cases})


if __name__ == "__main__":
    main()
