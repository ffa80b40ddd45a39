"""Surgery under a limit on its address space, on a checkpoint several times larger than that; and on a full disk."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.digest import write_random
from nemo_minitron.errors import CheckpointError
from nemo_minitron.prune import surgery
from nemo_minitron.prune.plan import LayerChoice, make_plan
from tests.support.checkpoints import UNTIED, write_llama

MIB = 2**20
LARGE = ArchSpec(family="llama", num_layers=8, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16,
                 num_query_groups=4, head_dim=64, vocab_size=8192)  # 515 MiB in fp32, the largest tensor 32 MiB

SCRIPT = """
import json, resource, sys
from pathlib import Path
from nemo_minitron.artifacts import Plan
from nemo_minitron.prune.surgery import prune_checkpoint

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

source, output, plan, allowance = sys.argv[1:]
limit = status("VmSize") + int(allowance)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = status("VmHWM")
prune_checkpoint(Path(source), Plan.from_dict(json.loads(Path(plan).read_text())), Path(output), shard_bytes=2**26)
print(status("VmHWM") - before)
"""


def test_surgery_needs_no_more_than_the_largest_tensor_and_a_block(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    write_random(LARGE, tmp_path / "source", tokenizer_directory=tokenizer, seed=1)
    size = sum(file.stat().st_size for file in (tmp_path / "source").glob("*.safetensors"))
    largest = 4 * LARGE.vocab_size * LARGE.hidden_size
    allowance = largest + 64 * MIB  # the output shard's size
    assert size > 5 * allowance
    plan = make_plan(LARGE, {}, None, layers=LayerChoice(drop=(3,)))
    rng = np.random.default_rng(0)
    cut = {"hidden": tuple(sorted(rng.choice(1024, 768, replace=False).tolist())),
           "ffn": (tuple(sorted(rng.choice(4096, 3000, replace=False).tolist())),) * 7}
    target = {**plan.to_dict(), **cut}
    target["target"] |= {"hidden_size": 768, "ffn_hidden_size": 3000}
    (tmp_path / "plan.json").write_text(json.dumps(target))
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "source"), str(tmp_path / "out"),
                           str(tmp_path / "plan.json"), str(allowance)], capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < allowance
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    write_llama(UNTIED, tmp_path / "source")

    def no_room(descriptor, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_room)
    with pytest.raises(CheckpointError, match=r"No space left on device.*output_dir"):
        surgery.prune_checkpoint(tmp_path / "source", make_plan(UNTIED, {}, None), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
