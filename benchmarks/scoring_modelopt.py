"""ModelOpt's `mcore_minitron` scoring and ours: the same Megatron weights, samples and metric, in one process.

    pip install -e '.[bench]' -c constraints.txt && python benchmarks/scoring_modelopt.py

Both measure a Llama (RMSNorm) with (batch=l2, sequence=mean), ModelOpt's only metric. ModelOpt gets a plain Megatron
`GPTModel` with local layers and torch's RMSNorm, which it does not know and which is registered with it here; ours
gets our own model with the same weights. After a warm-up, all turns alternate: ModelOpt's forward loop with its hooks
on (and the LM head, which it cannot leave out), `collect_scores`, and each side's plain forward. Seconds are medians.

`ranks` holds for each axis the smallest Spearman correlation over layers between both importances, and the largest
difference of values relative to the largest value. Query groups are compared twice, as ModelOpt has them and with its
own sums put in Megatron's order of channels: it views `[groups * heads per group, D]` as `[heads per group, groups, D]`
(modelopt 0.37, `_estimate_query_group_importance`), so that its "group" mixes heads of several groups.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from depth_scan import LAYOUT, random_model, random_samples  # opens the CPU door

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import write_json
from nemo_minitron.data.batch import TokenSamples
from nemo_minitron.importance.aggregate import importance
from nemo_minitron.importance.hooks import collect_scores
from nemo_minitron.model.build import HiddenStateGPT, transformer_config
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.cpu import cuda_is_available
from nemo_minitron.parallel.schedule import forward_only

SAMPLES, SEQ_LENGTH, MICRO_BATCH = 64, 256, 8
ARCH = ArchSpec(family="llama", num_layers=8, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8,
                num_query_groups=4, head_dim=32, vocab_size=2048, tied_embeddings=False)


def is_installed() -> bool:
    return importlib.util.find_spec("modelopt") is not None


def plain_megatron(ours: HiddenStateGPT) -> GPTModel:
    """Megatron's own model with local layers and the weights of `ours`."""
    config = transformer_config(ARCH, LAYOUT)
    model = GPTModel(config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=ARCH.vocab_size,
                     max_sequence_length=ARCH.max_position_embeddings, position_embedding_type="rope",
                     rotary_base=ARCH.rope.theta, share_embeddings_and_output_weights=False)
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights, list(weights)
    return model.eval()


def with_hooks(model: GPTModel) -> Any:
    """ModelOpt's search space on `model`, with torch's RMSNorm registered: its hooks measure every forward."""
    import modelopt.torch.nas as mtn
    import modelopt.torch.prune.plugins.mcore_minitron  # noqa: F401  registers the mode
    from modelopt.torch.nas.modules import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.prune.pruning import PruneModeRegistry

    class DynamicRMSNorm(_DynamicLayerNorm):
        def _setup(self) -> None:
            self.bias = None
            super()._setup()

    if torch.nn.RMSNorm not in DMRegistry:
        DMRegistry.register({torch.nn.RMSNorm: "nn.RMSNorm"})(DynamicRMSNorm)
    return mtn.convert(model, "mcore_minitron", registry=PruneModeRegistry)


def runs(samples: TokenSamples) -> tuple[dict[str, Callable[[], Any]], Any]:
    """What is timed, by name, and ModelOpt's converted model."""
    ids = np.arange(SAMPLES)
    parts = [samples.batch(part) for part in np.split(ids, SAMPLES // MICRO_BATCH)]
    ours = random_model(ARCH)
    head = ours.head()
    plain, hooked = plain_megatron(ours), with_hooks(plain_megatron(ours))

    def loop(model: GPTModel) -> None:
        with torch.no_grad():
            for batch in parts:
                model(batch.tokens, batch.position_ids, None)

    def multiply(hidden: torch.Tensor, batch: object) -> float:
        return float((hidden.reshape(-1, hidden.size(-1)) @ head.t())[0, 0])

    def forward() -> object:
        return forward_only(ours, iter(parts), num_microbatches=len(parts), consume=multiply)

    def score() -> object:
        return collect_scores(ours, samples, ids, layout=LAYOUT, micro_batch_size=MICRO_BATCH, source_digest="")

    return {"modelopt_forward": lambda: loop(plain), "modelopt_score": lambda: loop(hooked), "forward": forward,
            "score": score}, hooked


def theirs(hooked: Any, order: str = "modelopt") -> dict[str, np.ndarray]:
    """ModelOpt's importance by axis, `[rows, units]`; `order` "megatron" puts groups' channels right."""
    layers = hooked.decoder.layers
    heads_per_group = ARCH.heads_per_group
    attention = [layer.self_attention for layer in layers]
    if order == "megatron":
        shape = (ARCH.num_query_groups, heads_per_group * ARCH.head_dim)
        found = [part._activations.sqrt().view(shape).norm(dim=1) for part in attention]
    else:
        found = [part._estimate_query_group_importance() for part in attention]
    return {
        "hidden": hooked._estimate_hidden_size_importance()[None].numpy(),
        "ffn": np.stack([layer.mlp._estimate_importance().numpy() for layer in layers]),
        "heads": np.stack([part._estimate_all_head_importance().numpy() for part in attention]),
        "groups": np.stack([row.numpy() for row in found]),
        "layers": np.array([[float(layer._scores) for layer in layers]]) / (SAMPLES // MICRO_BATCH),
    }


def agreement(mine: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Smallest Spearman correlation over rows, and the largest difference over the largest value."""
    from scipy.stats import spearmanr

    rows = [float(spearmanr(a, b).statistic) for a, b in zip(np.atleast_2d(mine), np.atleast_2d(other), strict=True)]
    return {"spearman": min(rows), "difference": float(np.abs(mine - other).max() / np.abs(mine).max())}


def compare(turns: int) -> dict[str, Any]:
    """Ranks after one pass of each over the same samples, then seconds in turns."""
    with tempfile.TemporaryDirectory() as directory:
        samples = random_samples(Path(directory), ARCH, SAMPLES + 1, SEQ_LENGTH)
        what, hooked = runs(samples)
        what["modelopt_score"]()
        scores = what["score"]()
        mine = {axis: importance(scores, axis) for axis in ("hidden", "ffn", "heads", "groups", "layers")}
        ranks = {axis: agreement(mine[axis], value) for axis, value in theirs(hooked).items()}
        ranks["groups, channels in order"] = agreement(mine["groups"], theirs(hooked, "megatron")["groups"])
        what["forward"]()
        what["modelopt_forward"]()
        seconds: dict[str, list[float]] = {name: [] for name in what}
        for _ in range(turns):
            for name, run in what.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {"version": metadata.version("nvidia-modelopt"), "ranks": ranks, "seconds": middle,
            "score_over_modelopt": middle["score"] / middle["modelopt_score"],
            "modelopt_time_over_forward": middle["modelopt_score"] / middle["modelopt_forward"]}


def show(result: dict[str, Any]) -> None:
    """The table."""
    print(f"against ModelOpt {result['version']}: " + ", ".join(
        f"{name} {value:.3f} s" for name, value in result["seconds"].items()))
    for axis, row in result["ranks"].items():
        print(f"  {axis:28}Spearman {row['spearman']:.6f}   largest difference {row['difference']:.1e}")
    print(f"  score_over_modelopt {result['score_over_modelopt']:.3f}   "
          f"modelopt_time_over_forward {result['modelopt_time_over_forward']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/scoring_modelopt.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("nccl" if cuda_is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups.start(LAYOUT, timeout_s=600)
    groups.seed_everything(1)
    result = compare(arguments.turns)
    show(result)
    print(json.dumps({key: result[key] for key in ("score_over_modelopt", "modelopt_time_over_forward")}))
    write_json(arguments.out, result)


if __name__ == "__main__":
    main()
