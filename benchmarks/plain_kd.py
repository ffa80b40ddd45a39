"""The named alternative: what one would write instead of nemo_minitron, a plain PyTorch + transformers loop.

It repeats the stage `distill` of a finished run: the same teacher, pruned student, samples in the same order, tokens,
batch sizes, learning rates, weight decay and clipping, in one process. Shared with the run is the reading of data
(`nemo_minitron.data`) alone; model, loss, optimizer, schedule and evaluation are written out here with full logits.

Make a run first (README), for instance:

    minitron teacher.path=../shared/data/stories260K-hf data=stories data.path=../shared/data/tinystories-sample \\
        prune.target.hidden_size=48 prune.target.ffn_hidden_size=120 importance.num_samples=256 \\
        distill.tokens=1500000 controls=[ce,scratch] name=stories

then, in the same folder, because the run's paths may be relative to it:

    python benchmarks/plain_kd.py outputs/stories         (or: make bench-plain_kd ARGS=outputs/stories)

It prints a table and writes JSON: `loss_difference` is the held-out loss of the run's student minus that of this loop's
(nats/token, both models evaluated here, over all held-out tokens), `tokens_per_s_ratio` the run's training speed over
this loop's. The speed of both is over training steps, with reading of samples, without held-out looks; the run's also
holds its meters, logs and resume points, which this loop does not have. The ratio means something only where both had
the machine to themselves: a loop on the CPU that gets much less than `threads` seconds of CPU time a second had not.

Shape letters: B samples, S sequence, T tokens (B*S), V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import yaml
from torch import Tensor

from nemo_minitron.artifacts import read_json, write_json
from nemo_minitron.data.batch import TokenSamples
from nemo_minitron.data.prepare import prepare
from nemo_minitron.data.samples import positions_for, sample_order
from nemo_minitron.data.source import resolve_kind
from nemo_minitron.errors import UserError

CONTROLS = {"ce": "CE control", "scratch": "scratch control"}


def learning_rate(step: int, *, lr: float, min_lr: float, warmup_steps: int, num_steps: int) -> float:
    """Learning rate of `step` (from 0), as NeMo 2.7.3's `CosineAnnealing` has it with `constant_steps=0`.

    Linear from lr / (warmup_steps + 1) to lr at `step == warmup_steps`, then a half cosine that would reach `min_lr`
    at `step == num_steps`, one past the last step.
    """
    if warmup_steps > 0 and step <= warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def distillation_sums(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and the student's cross-entropy, each summed over all tokens, in nats.

    Logits are [B, S, V], labels [B, S] int64; every token counts, because training samples have no padding.
    """
    student_log_probs = F.log_softmax(student_logits.float(), dim=-1)
    teacher_log_probs = F.log_softmax(teacher_logits.float(), dim=-1)
    kl = F.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True)
    return kl, F.nll_loss(student_log_probs.flatten(0, 1), labels.flatten(), reduction="sum")


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Megatron's grouping: biases and other 1-D parameters (norms) are not decayed, everything else is."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def load_model(path: Path, device: torch.device) -> Any:
    """A Hugging Face model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)


class Run:
    """A finished run, as far as it is needed to repeat its distillation."""

    def __init__(self, directory: Path) -> None:
        """Read its records; `UserError` where it is not finished or cannot be repeated here."""
        round_dir = directory / "round1"
        self.manifest = read_json(round_dir / "distill" / "manifest.json")
        self.summary = read_json(directory / "summary.json")["rounds"][0]
        # config.yaml is the last command's, the manifest's part of it is what `distill` ran with
        self.config = yaml.safe_load((directory / "config.yaml").read_text()) | self.manifest["config"]
        self.metrics = [json.loads(line) for line in (round_dir / "distill" / "metrics.jsonl").read_text().splitlines()]
        if self.config["train"]["precision"] != "32":
            raise UserError("this loop has one precision", expected="train.precision=32",
                            found=self.config["train"]["precision"])
        self.student_path = round_dir / "prune" / "checkpoint"
        self.paths = {"teacher": Path(self.summary["teacher"]["path"]), "pruned": self.student_path,
                      "KD (ours)": round_dir / "distill" / "checkpoint"}
        self.records = {"teacher": self.summary["teacher"], "pruned": self.summary["pruned"],
                        "KD (ours)": self.summary["distilled"]}
        for name, label in CONTROLS.items():
            if name in self.summary["controls"]:
                self.paths[label] = round_dir / name / "checkpoint"
                self.records[label] = self.summary["controls"][name]
        for path in self.paths.values():
            if not (path / "config.json").exists():
                raise UserError("model not found", expected=f"a Hugging Face directory at {path} (the run's paths are "
                                "relative to where it was started)", found="none")
        self._data = self._prepared(directory.parent / "data")

    def _prepared(self, data_dir: Path) -> Any:
        """The run's own token files."""
        data = self.config["data"]
        found = prepare(
            kind=resolve_kind(data["kind"], data["path"]), directory=data_dir, tokenizer_directory=self.student_path,
            path=data["path"] and Path(data["path"]), separator=data["separator"], num_heldout=data["num_heldout"],
            heldout_fraction=data["heldout_fraction"], calibration_fraction=data["calibration_fraction"],
        )
        if found.digest != self.manifest["result"]["data_digest"]:
            raise UserError("the data has changed", expected="the text that the run was trained on",
                            found=f"another at {data['path']}")
        return found

    def samples(self, split: str) -> TokenSamples:
        """Samples of "train" or "heldout"."""
        return TokenSamples(self._data.open(split), self.config["data"]["seq_length"])

    @property
    def num_threads(self) -> int:
        """CPU threads that the run had in all its processes."""
        return self.manifest["world"]["threads"] * self.manifest["world"]["world_size"]


def distill(run: Run, student: Any, teacher: Any, device: torch.device) -> dict[str, Any]:
    """Train `student` in place; returns tokens, time, tokens/s and the KL of every step (nats/token)."""
    optim, train, weights = run.config["optim"], run.config["train"], run.config["distill"]
    samples, seed, num_steps = run.samples("train"), run.config["seed"], run.manifest["result"]["steps"]
    optimizer = torch.optim.AdamW(parameter_groups(student, optim["weight_decay"]), lr=optim["lr"], eps=optim["eps"],
                                  betas=(optim["beta1"], optim["beta2"]))
    schedule = {name: optim[name] for name in ("lr", "min_lr", "warmup_steps")} | {"num_steps": num_steps}
    step_tokens = train["global_batch_size"] * samples.spec.seq_length
    student.train()
    teacher.eval()
    kl_per_step: list[float] = []
    started, cpu_started = time.monotonic(), time.process_time()
    for step in range(num_steps):
        kl_sum = 0.0
        for positions in positions_for(step, global_batch_size=train["global_batch_size"],
                                       micro_batch_size=train["micro_batch_size"], dp_rank=0, dp_size=1):
            batch = samples.batch([sample_order(p, samples.spec.num_training_samples, seed) for p in positions])
            tokens, labels = batch.tokens.to(device), batch.labels.to(device)
            with torch.no_grad():
                teacher_logits = teacher(tokens, use_cache=False).logits
            kl, ce = distillation_sums(student(tokens, use_cache=False).logits, teacher_logits, labels)
            loss = (weights["kd_weight"] * kl + weights["ce_weight"] * ce) / step_tokens
            loss.backward()
            kl_sum += kl.item()
        if optim["clip_grad"] > 0:
            torch.nn.utils.clip_grad_norm_(student.parameters(), optim["clip_grad"])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, **schedule)
        optimizer.step()
        optimizer.zero_grad()
        kl_per_step.append(kl_sum / step_tokens)
        if (step + 1) % 50 == 0 or step + 1 == num_steps:
            speed = (step + 1) * step_tokens / (time.monotonic() - started)
            print(f"[plain] step {step + 1}/{num_steps}  kl {kl_per_step[-1]:.4f}  {speed:,.0f} tokens/s", flush=True)
    seconds = time.monotonic() - started
    return {"tokens": num_steps * step_tokens, "seconds": seconds, "tokens_per_s": num_steps * step_tokens / seconds,
            "cpu_seconds": time.process_time() - cpu_started, "kl_per_step": kl_per_step}


@torch.inference_mode()
def heldout_loss(model: Any, samples: TokenSamples, micro_batch_size: int, device: torch.device) -> float:
    """Cross-entropy in nats/token over every predicted held-out token."""
    model.eval()
    nats, num_tokens = 0.0, 0
    ids = range(samples.spec.num_evaluation_samples)
    for first in range(0, len(ids), micro_batch_size):
        batch = samples.batch(ids[first : first + micro_batch_size]).to(device)
        logits = model(batch.tokens, use_cache=False).logits.float()
        token_nats = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        nats += float((token_nats.double() * batch.loss_mask.flatten()).sum())
        num_tokens += int(batch.loss_mask.sum())
    return nats / num_tokens


def compare(run: Run, device: torch.device) -> dict[str, Any]:
    """Evaluate the run's models, train ours, and put both side by side."""
    heldout, size = run.samples("heldout"), run.config["evaluate"]["micro_batch_size"]
    models: dict[str, dict[str, Any]] = {}
    for label, path in run.paths.items():
        record = run.records[label]
        models[label] = {"loss": heldout_loss(load_model(path, device), heldout, size, device),
                         "loss_in_run": record["loss"],
                         **{name: record[name] for name in ("tokens", "seconds", "tokens_per_s")}}
    student = load_model(run.student_path, device)
    trained = distill(run, student, load_model(run.paths["teacher"], device), device)
    models["KD (plain)"] = {"loss": heldout_loss(student, heldout, size, device), "loss_in_run": None, **trained}
    ours, plain = models["KD (ours)"], models["KD (plain)"]
    kl_in_run = [line["kl"] for line in run.metrics if "kl" in line]
    gaps = [abs(a - b) for a, b in zip(kl_in_run, trained["kl_per_step"], strict=True)]
    evaluated_twice = [model for model in models.values() if model["loss_in_run"] is not None]
    return {
        "loss_difference": ours["loss"] - plain["loss"],
        "tokens_per_s_ratio": ours["tokens_per_s"] / plain["tokens_per_s"],
        "largest_kl_difference_of_first_5_steps": max(gaps[:5]),
        "largest_kl_difference": max(gaps),
        "largest_evaluation_difference": max(abs(model["loss"] - model["loss_in_run"]) for model in evaluated_twice),
        "cases": {
            "models": models,
            "command": ["python", *sys.argv],
            "threads": {"ours": run.num_threads, "plain": torch.get_num_threads()},
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "versions": {"ours": run.manifest["versions"],
                         "plain": {name: metadata.version(name) for name in ("torch", "transformers")}},
            "recipe": {name: run.config[name] for name in ("data", "optim", "train", "distill", "seed")},
        },
    }


def table(result: dict[str, Any]) -> str:
    """The comparison as text; what does not apply is a dash."""
    lines = [f"{'model':<16}{'held-out nats/token':>20}{'in the run':>12}{'tokens':>12}{'seconds':>10}{'tokens/s':>11}"]
    order = ["teacher", "pruned", "KD (ours)", "KD (plain)", *CONTROLS.values()]
    models, threads = result["cases"]["models"], result["cases"]["threads"]["plain"]
    plain = models["KD (plain)"]
    for label in (label for label in order if label in models):
        case = models[label]
        cells = [f"{case['loss']:.4f}"] + [
            "-" if case[name] is None else f"{case[name]:{form}}" for name, form in
            (("loss_in_run", ".4f"), ("tokens", ",d"), ("seconds", ",.1f"), ("tokens_per_s", ",.0f"))]
        lines.append(f"{label:<16}" + "".join(f"{cell:>{width}}" for cell, width in
                                              zip(cells, (20, 12, 12, 10, 11), strict=True)))
    return "\n".join([
        *lines, "",
        f"loss_difference (ours - plain)     {result['loss_difference']:+.5f} nats/token",
        f"tokens_per_s_ratio (ours / plain)  {result['tokens_per_s_ratio']:.3f}",
        f"largest difference of KL           {result['largest_kl_difference_of_first_5_steps']:.1e} in the first "
        f"5 steps, {result['largest_kl_difference']:.1e} in all",
        f"CPU time of the plain loop         {plain['cpu_seconds'] / plain['seconds']:.2f} s/s, threads: {threads}",
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a finished run: distilled and evaluated")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: as many as the run had")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/plain_kd.json"), help="JSON file to write")
    arguments = parser.parse_args()
    try:
        run = Run(arguments.run_dir)
    except UserError as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads or run.num_threads)
    result = compare(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    write_json(arguments.out, result)
    print(f"\n{table(result)}\n\n{arguments.out}")


if __name__ == "__main__":
    main()
