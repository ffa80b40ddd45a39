"""Saving pipeline stages; stages run one after the other, from the first one's barrier. TP is in tests/multirank."""

import dataclasses
import json

import pytest
import torch
import transformers

from nemo_minitron.checkpoint.families import read_arch
from nemo_minitron.checkpoint.save import save_checkpoint
from nemo_minitron.errors import CheckpointError
from tests.support.checkpoints import UNTIED, megatron_parameters, read_llama, write_llama

TIED = dataclasses.replace(UNTIED, tied_embeddings=True)


def save(tensors, arch, base, directory, *, pp_size=1, dtype=None, change=None):
    """Save as `pp_size` stages, and a second replica that must write nothing."""
    num_layers = arch.num_layers // pp_size

    def stage(pp_rank, barrier, dp_rank=0):
        layers = range(pp_rank * num_layers, (pp_rank + 1) * num_layers)
        parameters = megatron_parameters(tensors, arch, tp_rank=0, tp_size=1, layers=layers, first=pp_rank == 0,
                                         last=pp_rank == pp_size - 1)
        if dp_rank:
            parameters = {name: torch.full_like(tensor, torch.nan) for name, tensor in parameters.items()}
        save_checkpoint(((name, torch.nn.Parameter(tensor)) for name, tensor in parameters.items()), arch, directory,
                        base_directory=base, tp_group=None, tp_rank=0, tp_size=1, pp_rank=pp_rank, pp_size=pp_size,
                        dp_rank=dp_rank, layer_offset=layers.start, dtype=dtype, barrier=barrier)

    barriers = []

    def others_then_go_on():
        barriers.append(directory.exists())
        if len(barriers) == 2:  # the coordinator has written its file: now all the others
            for pp_rank in range(1, pp_size):
                stage(pp_rank, lambda: None)
            stage(0, lambda: None, dp_rank=1)

    stage(0, others_then_go_on)
    return barriers


@pytest.mark.parametrize("pp_size", [1, 2, 4])
@pytest.mark.parametrize("arch", [UNTIED, TIED], ids=["untied", "tied"])
def test_round_trip_is_bit_equal(tmp_path, arch, pp_size):
    base, directory = tmp_path / "base", tmp_path / "out" / "checkpoint"
    tensors = write_llama(arch, base)
    assert save(tensors, arch, base, directory, pp_size=pp_size) == [False, False, True]
    saved = read_llama(directory)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    assert len(list(directory.glob("*.safetensors"))) == pp_size
    assert [path.name for path in directory.parent.iterdir()] == ["checkpoint"]


def test_transformers_computes_the_same(tmp_path):
    base, directory = tmp_path / "base", tmp_path / "checkpoint"
    tensors = write_llama(UNTIED, base)
    save(tensors, UNTIED, base, directory, pp_size=2)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        logits = [transformers.AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (base, directory)]
    assert torch.equal(*logits)


def test_config_and_tokenizer_come_from_the_base(tmp_path):
    base, directory = tmp_path / "base", tmp_path / "checkpoint"
    source = dataclasses.replace(UNTIED, num_layers=6, ffn_hidden_size=64)
    write_llama(source, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "bos_token_id": 7, "dtype": "float16"}))
    (base / "tokenizer.json").write_text("{}")
    tensors = write_llama(UNTIED, tmp_path / "target")
    save(tensors, UNTIED, base, directory, dtype="BF16")
    written = json.loads((directory / "config.json").read_text())
    assert read_arch(directory) == UNTIED
    assert written["bos_token_id"] == 7
    assert written["torch_dtype"] == "bfloat16"
    assert "dtype" not in written
    assert (directory / "tokenizer.json").read_text() == "{}"
    saved = read_llama(directory)
    assert all(torch.equal(saved[name], tensor.to(torch.bfloat16)) for name, tensor in tensors.items())


def test_a_failed_save_leaves_the_earlier_directory(tmp_path, monkeypatch):
    base, directory = tmp_path / "base", tmp_path / "checkpoint"
    tensors = write_llama(UNTIED, base)
    save(tensors, UNTIED, base, directory)

    def fail(*args):
        raise CheckpointError("no")

    monkeypatch.setattr("nemo_minitron.checkpoint.save.to_numpy", fail)
    with pytest.raises(CheckpointError):
        save(tensors, UNTIED, base, directory)
    assert read_llama(directory).keys() == tensors.keys()
    assert list((tmp_path / "checkpoint.partial").iterdir()) == []
