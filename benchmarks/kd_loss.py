"""The fused distillation loss against the eager formula, and against ModelOpt's loss where it is installed.

    python benchmarks/kd_loss.py            (or: make bench-kd_loss)

Each side starts from the final hidden states and the LM heads of student and teacher and ends with the gradients by the
student's. Eager: full fp32 logits of both, softmax, `kl_div`, autograd. ModelOpt: `LogitsKLLoss` on the same logits.
(With CUDA: bfloat16, one larger case, and Liger's fused linear JSD where it is installed.) After a warm-up all take
turns; seconds are medians, and ratios are of medians. Memory is the peak above the inputs: on CPU resident bytes of a
fresh process that does one thing once (glibc told to give freed blocks back at once, the BLAS library's own workspaces
allocated before), on CUDA what the allocator says.

JSON: `time_ratio`, the worst; `memory_ratio_32k` and `_64k`; `memory_over_bound`: peak over grad_W + grad_h and 2.5
chunks of local logits, the worst; `collectives_per_chunk`, counted at TP 2 and 4; `grad_error_ratio`: error norm of the
fused gradients over eager's, both against float64, the worst; `loss_error`, relative; `tp_difference`: the largest
relative difference of loss and gradients at TP 2 and 4 from TP 1, fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nemo_minitron.artifacts import write_json
from nemo_minitron.distill.fused_kl import fused_linear_loss
from nemo_minitron.distill.losses import LossWeights
from nemo_minitron.parallel.cpu import cuda_is_available, open_cpu_door

CASES = {"32k": (1024, 32768, 512, 1024), "64k": (2048, 65536, 256, 512)}
CUDA_CASES = {"131k": (8192, 131072, 2048, 4096)}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
Tensors = dict[str, torch.Tensor]


def inputs(case: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Tensors:
    """Hidden states and heads whose logits have a deviation of about 2, the teacher's unrelated to the student's."""
    tokens, vocab, student, teacher = case
    generator = torch.Generator().manual_seed(1)
    shapes = {"student_hidden": (tokens, student), "student_head": (vocab, student),
              "teacher_hidden": (tokens, teacher), "teacher_head": (vocab, teacher)}
    made = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    made["student_head"] *= 2 / student**0.5
    made["teacher_head"] *= 2 / teacher**0.5
    made = {name: tensor.to(device, dtype) for name, tensor in made.items()}
    for name in ("student_hidden", "student_head"):
        made[name].requires_grad_()
    return made


def backward(loss: torch.Tensor, made: Tensors) -> tuple[float, torch.Tensor, torch.Tensor]:
    """(loss, gradient by the hidden states, gradient by the head), leaving none behind."""
    loss.backward()
    grads = [made[name].grad for name in ("student_hidden", "student_head")]
    for name in ("student_hidden", "student_head"):
        made[name].grad = None
    assert grads[0] is not None and grads[1] is not None
    return float(loss), grads[0], grads[1]


def fused(made: Tensors, chunk: int) -> Any:
    tokens = len(made["student_hidden"])
    device = made["student_hidden"].device
    result = fused_linear_loss(
        made["student_hidden"], made["student_head"], teacher_hidden=made["teacher_hidden"],
        teacher_head=made["teacher_head"], labels=torch.zeros(tokens, dtype=torch.int64, device=device),
        loss_mask=torch.ones(tokens, device=device), vocab_size=len(made["student_head"]), vocab_start=0, group=None,
        weights=LossWeights(), chunk_tokens=chunk)
    return backward(result.loss / tokens, made)


def logits(made: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    student = made["student_hidden"] @ made["student_head"].t()
    with torch.no_grad():
        teacher = made["teacher_hidden"] @ made["teacher_head"].t()
    return student, teacher


def eager(made: Tensors, _chunk: int = 0) -> Any:
    student, teacher = logits(made)
    log_probs, probs = student.float().log_softmax(-1), teacher.float().softmax(-1)
    kl = torch.nn.functional.kl_div(log_probs, probs, reduction="none").sum(-1)
    return backward(kl.mean(), made)


def modelopt(made: Tensors, _chunk: int = 0) -> Any:
    from types import SimpleNamespace

    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    student, teacher = logits(made)
    loss, *_ = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1))(student[:, None], teacher[:, None])
    return backward(loss.mean(), made)


def liger(made: Tensors, _chunk: int = 0) -> Any:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0)(made["student_hidden"], made["student_head"], made["teacher_hidden"],
                                             made["teacher_head"])
    return backward(loss, made)


def exact(made: Tensors) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss and gradients in float64, 128 tokens at a time."""
    wide = {name: tensor.detach().double() for name, tensor in made.items()}
    for name in ("student_hidden", "student_head"):
        wide[name].requires_grad_()
    tokens, total = len(wide["student_hidden"]), 0.0
    for first in range(0, tokens, 128):
        part = {name: tensor[first : first + 128] if name.endswith("hidden") else tensor
                for name, tensor in wide.items()}
        student, teacher = (part[f"{side}_hidden"] @ part[f"{side}_head"].t() for side in ("student", "teacher"))
        log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        loss = (log_teacher.exp() * (log_teacher - log_student)).sum() / tokens
        loss.backward()
        total += float(loss)
    grads = [wide[name].grad for name in ("student_hidden", "student_head")]
    assert grads[0] is not None and grads[1] is not None
    return total, grads[0], grads[1]


def installed() -> dict[str, Callable[..., Any]]:
    sides: dict[str, Callable[..., Any]] = {"fused": fused, "eager": eager}
    for name, package, run in (("modelopt", "modelopt.torch.distill.plugins.megatron", modelopt),
                               ("liger", "liger_kernel.transformers.fused_linear_jsd", liger)):
        try:
            __import__(package)
        except ImportError:
            print(f"{name} is not installed")
            continue
        if name != "liger" or cuda_is_available():
            sides[name] = run
    return sides


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_here(run: Callable[..., Any], made: Tensors, chunk: int) -> int:
    """Peak bytes above the inputs of one call in this process."""
    if cuda_is_available():
        run(made, chunk)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(made, chunk)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    small = inputs((8, 64, 8, 8), torch.float32, "cpu")
    run(small, 4)  # code and thread pools
    _fill_workspaces(made)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    run(made, chunk)
    return resident_bytes("VmHWM") - before


def _fill_workspaces(made: Tensors) -> None:
    """Have the BLAS library allocate what it keeps for such products: 41 MiB with MKL on Intel, on every side."""
    with torch.no_grad():
        for side in ("student", "teacher"):
            hidden, head = made[f"{side}_hidden"], made[f"{side}_head"]
            logits = hidden @ head.t()
            logits.t() @ hidden
            logits @ head


def measure(name: str, case: tuple[int, int, int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    cuda = cuda_is_available()
    dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
    made, sides, chunk = inputs(case, dtype, device), installed(), arguments.chunk or (1024 if cuda else 256)

    def seconds(run: Callable[..., Any]) -> float:
        started = time.perf_counter()
        run(made, chunk)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for run in sides.values():
        run(made, chunk)
    turns = [{which: seconds(run) for which, run in sides.items()} for _ in range(arguments.turns)]
    middle = {which: statistics.median(turn[which] for turn in turns) for which in sides}
    if cuda:
        peaks = {which: peak_here(run, made, chunk) for which, run in sides.items()}
    else:
        peaks = {which: int(subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--child", which, name, "--threads", str(arguments.threads),
             "--chunk", str(chunk)], check=True, capture_output=True, text=True, env=os.environ | GIVE_BACK,
        ).stdout.split()[-1]) for which in sides}
    tokens, vocab, student, _ = case
    bound = 4 * (vocab * student + tokens * student + 2.5 * chunk * vocab)
    found: dict[str, Any] = {"shape": case, "chunk_tokens": chunk, "seconds": middle, "peak_bytes": peaks,
                             "time_ratio": middle["fused"] / middle["eager"],
                             "time_ratio_of_turns": [turn["fused"] / turn["eager"] for turn in turns],
                             "memory_ratio": peaks["fused"] / peaks["eager"],
                             "memory_over_bound": peaks["fused"] / bound}
    if not cuda:
        found |= errors(made, chunk)
    return found


def errors(made: Tensors, chunk: int) -> dict[str, float]:
    """Against float64, as norms."""
    reference, got, plain = exact(made), fused(made, chunk), eager(made)
    ratios = [float((ours.double() - true).norm() / (theirs.double() - true).norm())
              for ours, theirs, true in zip(got[1:], plain[1:], reference[1:], strict=True)]
    return {"grad_error_ratio": max(ratios), "loss_error": abs(got[0] - reference[0]) / reference[0]}


def shard(rank: int, degree: int, folder: str) -> None:
    """One TP rank: loss and gradients of its vocabulary shard, and the collectives it took."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{degree}", rank=rank, world_size=degree)
    tokens, vocab, chunk = 512, 8192, 128
    made = inputs((tokens, vocab, 128, 256), torch.float32, "cpu")
    expected = fused(made, chunk)
    count, all_reduce = [0], dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counting
    rows = slice(rank * vocab // degree, (rank + 1) * vocab // degree)
    local = {name: (tensor[rows] if name.endswith("head") else tensor).detach().clone()
             for name, tensor in made.items()}
    for name in ("student_hidden", "student_head"):
        local[name].requires_grad_()
    result = fused_linear_loss(
        local["student_hidden"], local["student_head"], teacher_hidden=local["teacher_hidden"],
        teacher_head=local["teacher_head"], labels=torch.zeros(tokens, dtype=torch.int64),
        loss_mask=torch.ones(tokens), vocab_size=vocab, vocab_start=rows.start, group=dist.group.WORLD,
        weights=LossWeights(), chunk_tokens=chunk)
    loss, grad_hidden, grad_head = backward(result.loss / tokens, local)
    collectives = count[0] - 2  # one sum of the KL and one of the argmax a micro-batch
    all_reduce(grad_hidden)
    pairs = ((grad_hidden, expected[1]), (grad_head, expected[2][rows]))
    differences = [abs(loss - expected[0]) / expected[0], *(float((a - b).norm() / b.norm()) for a, b in pairs)]
    Path(folder, f"{degree}-{rank}.json").write_text(json.dumps([max(differences), collectives / (tokens // chunk)]))
    dist.destroy_process_group()


def sharded() -> dict[str, float]:
    """The worst over ranks of TP 2 and 4."""
    with tempfile.TemporaryDirectory() as folder:
        for degree in (2, 4):
            mp.spawn(shard, args=(degree, folder), nprocs=degree)
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return {"tp_difference": max(row[0] for row in found), "collectives_per_chunk": max(row[1] for row in found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk", type=int, help="tokens a chunk; 256 on CPU, 1024 on CUDA")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/kd_loss.json"))
    parser.add_argument("--child", nargs=2, metavar=("WHICH", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        which, name = arguments.child
        made = inputs(CASES[name], torch.float32, "cpu")
        print(peak_here(installed()[which], made, arguments.chunk))
        return
    cases = {name: measure(name, case, arguments)
             for name, case in (CUDA_CASES if cuda_is_available() else CASES).items()}
    print(f"{'case':8}{'side':10}{'seconds':>9}{'over eager':>12}{'peak MiB':>10}{'over eager':>12}")
    for name, case in cases.items():
        for which, value in case["seconds"].items():
            peak = case["peak_bytes"][which]
            print(f"{name:8}{which:10}{value:9.3f}{value / case['seconds']['eager']:12.3f}{peak / 2**20:10.0f}"
                  f"{peak / case['peak_bytes']['eager']:12.4f}")
    worst = {key: max(case[key] for case in cases.values() if key in case)
             for key in ("time_ratio", "memory_over_bound", "grad_error_ratio", "loss_error")
             if any(key in case for case in cases.values())}
    worst |= {f"memory_ratio_{name}": case["memory_ratio"] for name, case in cases.items()} | sharded()
    print(json.dumps(worst))
    write_json(arguments.out, {**worst, "cases": cases, "threads": arguments.threads})


open_cpu_door()  # ModelOpt imports Megatron

if __name__ == "__main__":
    main()
