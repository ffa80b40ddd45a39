"""What sharing prefixes saves in a scan over blocks of layers, against a whole pass for each block.

    python benchmarks/depth_scan.py            (or: make bench-depth_scan)

Both measure the loss of one randomly initialised Megatron model (one process) without each block of k neighbours, on
the same samples: `scan_depth`, and a loop that really takes the layers out of the model and runs what is left from the
embedding on. Both have one warm-up, then take turns; seconds are the median of the turns, and the range of the turns'
own ratios says how far to trust the ratio of medians. Layer forwards (one layer on one micro-batch) are counted in the
model by hooks, and those of the scan must be what it says itself. Both include the whole model's pass, which is why
the ratio of layer forwards is a little above a half.

It prints a table and writes JSON: `layer_forwards_ratio` and `seconds_ratio` are the scan's over the loop's, the worst
of all cases; `largest_loss_difference` is the largest one between both (nats/token, over all predicted tokens). At
pp > 1 nothing is shared: the ratio is one.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_minitron.parallel.cpu import cuda_is_available, device, open_cpu_door

open_cpu_door()  # before Megatron is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from nemo_minitron.arch import ArchSpec  # noqa: E402
from nemo_minitron.artifacts import write_json  # noqa: E402
from nemo_minitron.data.batch import TokenSamples  # noqa: E402
from nemo_minitron.data.indexed import build, open_tokens  # noqa: E402
from nemo_minitron.distill.terms import METERS, loss_terms  # noqa: E402
from nemo_minitron.importance.depth import scan_depth  # noqa: E402
from nemo_minitron.model.build import HiddenStateGPT, build_model, transformer_config  # noqa: E402
from nemo_minitron.parallel import groups  # noqa: E402
from nemo_minitron.parallel.layout import Layout  # noqa: E402
from nemo_minitron.parallel.schedule import forward_only  # noqa: E402

LAYOUT = Layout()


def random_model(arch: ArchSpec) -> HiddenStateGPT:
    """Normal weights with a deviation of 0.02, norms of one."""
    model = build_model(arch, transformer_config(arch, LAYOUT))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02)
    return model


def random_samples(directory: Path, arch: ArchSpec, num_samples: int, seq_length: int) -> TokenSamples:
    tokens = np.random.default_rng(1).integers(arch.vocab_size, size=num_samples * seq_length + 1)
    build(directory / "tokens", [tokens], np.uint16)
    return TokenSamples(open_tokens(directory / "tokens"), seq_length, vocab_size=arch.vocab_size)


def naive_losses(model: HiddenStateGPT, samples: TokenSamples, micro_batch_size: int, length: int) -> list[float]:
    """Nats/token of the whole model, then without each block of `length` layers: a whole pass for each."""
    layers = model.decoder.layers
    ids = list(range(samples.spec.num_training_samples))
    turns = [ids[start : start + micro_batch_size] for start in range(0, len(ids), micro_batch_size)]
    blocks = [range(0), *(range(start, start + length) for start in range(len(layers) - length + 1))]
    losses = []
    for block in blocks:
        model.decoder.layers = torch.nn.ModuleList(layer for place, layer in enumerate(layers) if place not in block)
        sums = forward_only(model, (samples.batch(turn).to(device()) for turn in turns), num_microbatches=len(turns),
                            consume=lambda hidden, batch: loss_terms(model, hidden, batch).sums)
        total = torch.stack(sums).sum(0)
        losses.append(float(total[METERS.index("ce")] / total[METERS.index("tokens")]))
    model.decoder.layers = layers
    return losses


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` returns, and its seconds."""
    started = time.monotonic()
    result = run()
    if cuda_is_available():
        torch.cuda.synchronize()
    return result, time.monotonic() - started


def measure(model: HiddenStateGPT, samples: TokenSamples, *, length: int, micro_batch_size: int,
            repeats: int) -> dict[str, Any]:
    """One case: both ways in turns."""
    forwards = [0]

    def count(*_: Any) -> None:
        forwards[0] += 1

    def scan() -> Any:
        return scan_depth(model, samples, np.arange(samples.spec.num_training_samples), layout=LAYOUT,
                          micro_batch_size=micro_batch_size, metrics=["loss"], block_lengths=[length])

    def naive() -> list[float]:
        return naive_losses(model, samples, micro_batch_size, length)

    hooks = [layer.mlp.register_forward_hook(count) for layer in model.decoder.layers]
    found, scan_forwards = scan(), forwards[0]
    losses, naive_forwards = naive(), forwards[0] - scan_forwards
    for hook in hooks:
        hook.remove()
    assert (found.layer_forwards, found.naive_layer_forwards) == (scan_forwards, naive_forwards)
    scanned = [*found.tensors["layers.loss.0"], *found.tensors[f"layers.loss.{length}"]]
    seconds: dict[str, list[float]] = {"scan": [], "naive": []}
    for _ in range(repeats):
        for name, run in (("scan", scan), ("naive", naive)):
            seconds[name].append(timed(run)[1])
    medians = {name: statistics.median(turns) for name, turns in seconds.items()}
    return {
        "block_length": length, "num_blocks": len(losses) - 1,
        "layer_forwards": {"scan": scan_forwards, "naive": naive_forwards},
        "layer_forwards_ratio": scan_forwards / naive_forwards,
        "seconds": medians, "seconds_of_turns": seconds, "seconds_ratio": medians["scan"] / medians["naive"],
        "seconds_ratio_of_turns": [ours / theirs for ours, theirs in zip(*seconds.values(), strict=True)],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(scanned, losses, strict=True)),
    }


def table(cases: list[dict[str, Any]]) -> str:
    """The cases as text."""
    lines = [f"{'block':>5}{'blocks':>8}{'forwards':>10}{'naive':>8}{'ratio':>8}{'seconds':>9}{'naive':>8}{'ratio':>8}"
             f"{'of turns':>14}{'loss diff':>11}"]
    for case in cases:
        forwards, seconds, turns = case["layer_forwards"], case["seconds"], case["seconds_ratio_of_turns"]
        lines.append(f"{case['block_length']:>5}{case['num_blocks']:>8}{forwards['scan']:>10}{forwards['naive']:>8}"
                     f"{case['layer_forwards_ratio']:>8.3f}{seconds['scan']:>9.2f}{seconds['naive']:>8.2f}"
                     f"{case['seconds_ratio']:>8.3f}{f'{min(turns):.3f}-{max(turns):.3f}':>14}"
                     f"{case['largest_loss_difference']:>11.1e}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="layers of the model")
    parser.add_argument("--hidden", type=int, default=256, metavar="N", help="its hidden size; a multiple of 32")
    parser.add_argument("--vocab", type=int, default=2048, metavar="N", help="its vocabulary")
    parser.add_argument("--seq-length", type=int, default=256, metavar="N", help="tokens a sample")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="samples")
    parser.add_argument("--micro-batch-size", type=int, default=4, metavar="N", help="samples a forward pass")
    parser.add_argument("--block-lengths", type=int, nargs="+", default=[1, 4], metavar="K", help="blocks to leave out")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns that are timed")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/depth_scan.json"), help="the JSON file")
    arguments = parser.parse_args()
    if not all(1 <= length < arguments.layers for length in arguments.block_lengths):
        parser.error(f"--block-lengths: expected 1 to {arguments.layers - 1}, found {arguments.block_lengths}")
    torch.set_num_threads(arguments.threads)
    arch = ArchSpec(family="llama", num_layers=arguments.layers, hidden_size=arguments.hidden,
                    ffn_hidden_size=3 * arguments.hidden, num_attention_heads=arguments.hidden // 32,
                    num_query_groups=arguments.hidden // 32, head_dim=32, vocab_size=arguments.vocab,
                    max_position_embeddings=arguments.seq_length).check()
    dist.init_process_group("nccl" if cuda_is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups.start(LAYOUT, timeout_s=600)
    groups.seed_everything(1)
    model = random_model(arch)
    with tempfile.TemporaryDirectory() as directory:
        samples = random_samples(Path(directory), arch, arguments.samples, arguments.seq_length)
        cases = [measure(model, samples, length=length, micro_batch_size=arguments.micro_batch_size,
                         repeats=arguments.repeats) for length in arguments.block_lengths]
    groups.stop()
    result = {name: max(case[name] for case in cases)
              for name in ("layer_forwards_ratio", "seconds_ratio", "largest_loss_difference")}
    write_json(arguments.out, result | {"cases": {
        "blocks": cases, "command": ["python", *sys.argv], "arch": arch.to_dict(),
        "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
        "device": torch.cuda.get_device_name() if cuda_is_available() else platform.machine(),
        "versions": {name: metadata.version(name) for name in ("torch", "megatron-core")}}})
    print(f"{table(cases)}\n\n" + "\n".join(f"{name:<26}{value:.4g}" for name, value in result.items())
          + f"\n\n{arguments.out}")


if __name__ == "__main__":
    main()
