"""The model card (`README.md`) of a checkpoint that this project wrote: lineage, licence, tokens, losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoint.families import read_arch
from nemo_minitron.config import Config
from nemo_minitron.data.corpus import xz_bits_per_byte

_MADE = {
    "correct": "trained by cross-entropy",
    "prune": "pruned, not trained after it",
    "distill": "pruned, then distilled from the teacher's logits (forward KL)",
    "ce": "pruned, then trained by cross-entropy (a control)",
    "align": "fine-tuned on conversations by the cross-entropy of their answers",
    "scratch": "the pruned architecture from random weights, trained by cross-entropy (a control)",
    "scratch_until": "the pruned architecture from random weights, trained by cross-entropy for as long as it took (a "
                     "control)",
}


def write_card(directory: Path, *, stage: str, manifests: Mapping[str, Manifest | None],
               evaluated: Mapping[str, Mapping[str, Any]], config: Config) -> None:
    """Write `README.md` into the checkpoint `directory` made by `stage`; losses are nats/token on held-out text."""
    names = {"correct": "teacher", "prune": "pruned", "distill": "distilled", "align": "aligned"}
    record = evaluated[names.get(stage, stage)]
    manifest = manifests[stage]
    assert manifest is not None
    arch = read_arch(directory)
    teacher = f"`{config.teacher.path}`" if config.teacher.path else "random weights (stage initialize)"
    lines = [
        "---", "library_name: transformers", "tags: [nemo_minitron]", "---", "",
        f"# {config.name}: {stage}", "", f"A {arch.family} model, {_MADE[stage]}, by nemo_minitron.", "",
        "| | |", "|---|---|",
        f"| derived from | {teacher} |",
        f"| licence of that | {config.teacher.licence} |",
        f"| parameters | {arch.num_parameters():,} ({arch.num_non_embedding_parameters():,} non-embedding) |",
        f"| layers, hidden, FFN | {arch.num_layers}, {arch.hidden_size}, {arch.ffn_hidden_size} |",
        f"| heads, KV groups, head_dim | {arch.num_attention_heads}, {arch.num_query_groups}, {arch.head_dim} |",
        f"| vocabulary | {arch.vocab_size} |",
        f"| data | {_data_source(config)} |",
    ]
    if "tokens" in manifest.result:
        lines.append(f"| training tokens | {manifest.result['tokens']:,} in {manifest.result['steps']:,} steps, "
                     f"{manifest.result['seconds']:,.0f} s |")
    loss = f"{record['loss']:.4f} nats/token over {record['num_tokens']:,} tokens"
    if record["bits_per_byte"] is not None:
        loss += f"; {record['bits_per_byte']:.4f} bits/byte over {record['num_bytes']:,} bytes"
    lines.append(f"| held-out loss | {loss} |")
    lines += [f"| held-out loss on answers, {name} | {found['loss']:.4f} nats/token over {found['num_tokens']:,} "
              "tokens |" for name, found in record.get("answers", {}).items()]
    if config.data.path is None and not config.data.blend:
        lines.append(f"| `xz -9` on the same held-out files | {xz_bits_per_byte():.4f} bits/byte |")
    if stage != "correct":
        lines.append(f"| teacher's held-out loss | {evaluated['teacher']['loss']:.4f} nats/token |")
    lines += [f"| weights digest | sha256 {manifest.result['weights_digest']} |",
              f"| command | `{manifest.world['command']}` (resolved recipe: `config.yaml` of the run) |", ""]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _data_source(config: Config) -> str:
    blend = ", ".join(f"{source.name} ({source.weight:g})" for source in config.data.blend)
    return blend or config.data.path or "the embedded corpus (sources of sympy, see data/sympy.digests)"
