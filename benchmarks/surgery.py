"""What surgery costs, against loading the checkpoint with `transformers`, slicing it and saving it.

    python benchmarks/surgery.py            (or: make bench-surgery)

A synthetic Llama checkpoint in bf16 (2.3 GB, several shards) is cut in all widths. Each way runs in a fresh process;
after one run to warm the page cache they take turns, and seconds are medians. Both flush nothing but what they do by
themselves: surgery syncs its files to disk, `save_pretrained` does not. Peak memory is VmHWM of the process, which
counts mapped pages; `rss_ratio` and `time_ratio` are surgery's over the other's. Importing is part of neither time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import write_json
from nemo_minitron.checkpoint.digest import write_random
from nemo_minitron.importance.aggregate import Ranking
from nemo_minitron.importance.baselines import random_importance
from nemo_minitron.importance.scores import Scores
from nemo_minitron.prune.plan import make_plan

SOURCE = ArchSpec(family="llama", num_layers=18, hidden_size=2048, ffn_hidden_size=7168, num_attention_heads=16,
                  num_query_groups=8, head_dim=128, vocab_size=32000)
TARGET = {"hidden_size": 1536, "ffn_hidden_size": 4608, "num_attention_heads": 8}

PEAK = """
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
"""
OURS = PEAK + """
import json, sys, time
from pathlib import Path
from nemo_minitron.artifacts import Plan
from nemo_minitron.prune.surgery import prune_checkpoint
source, plan, output = map(Path, sys.argv[1:])
plan = Plan.from_dict(json.loads(plan.read_text()))
started = time.perf_counter()
prune_checkpoint(source, plan, output)
print(json.dumps({"seconds": time.perf_counter() - started, "peak_bytes": peak()}))
"""
THEIRS = PEAK + """
import json, sys, time
import torch, transformers
source, plan, output = sys.argv[1:]
plan = json.load(open(plan))
started = time.perf_counter()
with torch.no_grad():
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    def cut(parameter, rows=None, columns=None):
        data = parameter.data
        data = data if rows is None else data[rows]
        parameter.data = data if columns is None else data[:, columns]
    hidden, size = plan["hidden"], model.config.head_dim
    cut(model.model.embed_tokens.weight, None, hidden)
    cut(model.lm_head.weight, None, hidden)
    cut(model.model.norm.weight, hidden)
    for layer, ffn, heads in zip(model.model.layers, plan["ffn"], plan["heads"]):
        queries = [head * size + place for head in heads for place in range(size)]
        attention, mlp = layer.self_attn, layer.mlp
        cut(attention.q_proj.weight, queries, hidden)
        cut(attention.k_proj.weight, None, hidden)
        cut(attention.v_proj.weight, None, hidden)
        cut(attention.o_proj.weight, hidden, queries)
        cut(mlp.gate_proj.weight, ffn, hidden)
        cut(mlp.up_proj.weight, ffn, hidden)
        cut(mlp.down_proj.weight, hidden, ffn)
        cut(layer.input_layernorm.weight, hidden)
        cut(layer.post_attention_layernorm.weight, hidden)
    for key in ("hidden_size", "num_attention_heads"):
        setattr(model.config, key, plan["target"][key])
    model.config.intermediate_size = plan["target"]["ffn_hidden_size"]
    model.save_pretrained(output)
print(json.dumps({"seconds": time.perf_counter() - started, "peak_bytes": peak()}))
"""


def prepare(directory: Path) -> int:
    """Write the checkpoint and the plan; returns the bytes of the weights."""
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    write_random(SOURCE, directory / "source", tokenizer_directory=tokenizer, seed=1, dtype="BF16")
    scores = Scores(source=SOURCE, num_samples=1, samples_digest="", source_digest="", measures={},
                    tensors=random_importance(SOURCE, 1))
    plan = make_plan(SOURCE, TARGET, scores, ranking=Ranking(method="random"))
    write_json(directory / "plan.json", plan.to_dict())
    return sum(file.stat().st_size for file in (directory / "source").glob("*.safetensors"))


def run(script: str, directory: Path, output: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", script, str(directory / "source"), str(directory / "plan.json"),
                           str(directory / output)], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/surgery.json"), help="the JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        size = prepare(Path(name))
        print(f"checkpoint: {size:,} bytes", flush=True)
        scripts = {"surgery": OURS, "transformers": THEIRS}
        run(OURS, Path(name), "surgery")
        turns = [{which: run(script, Path(name), which) for which, script in scripts.items()}
                 for _ in range(arguments.turns)]
    cases = {which: {"seconds": statistics.median(turn[which]["seconds"] for turn in turns),
                     "peak_bytes": max(turn[which]["peak_bytes"] for turn in turns)} for which in scripts}
    ratios = {"rss_ratio": cases["surgery"]["peak_bytes"] / cases["transformers"]["peak_bytes"],
              "time_ratio": cases["surgery"]["seconds"] / cases["transformers"]["seconds"]}
    for which, case in cases.items():
        print(f"{which:14}{case['seconds']:9.2f} s{case['peak_bytes'] / 2**20:9.0f} MiB")
    print(json.dumps(ratios))
    write_json(arguments.out, {**ratios, "cases": cases, "turns": turns, "checkpoint_bytes": size})


if __name__ == "__main__":
    main()
