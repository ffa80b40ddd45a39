"""Each rank's parameters against Megatron's layout written out row by row."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoint.families import parameter_source, read_arch
from nemo_minitron.checkpoint.load import load_shard, read_head
from nemo_minitron.checkpoint.numbers import to_numpy, to_torch
from nemo_minitron.checkpoint.tensors import TensorReader
from nemo_minitron.errors import CheckpointError
from tests.support.checkpoints import UNTIED, megatron_parameters, read_llama, write_llama

TIED = dataclasses.replace(UNTIED, tied_embeddings=True, num_query_groups=8, vocab_size=100)


def loaded(directory, arch, expected, *, dtype=None, tp_rank=0, tp_size=1, layer_offset=0, prefix=""):
    """Parameters of the names and shapes of `expected`, filled from `directory`."""
    parameters = {name: torch.nn.Parameter(torch.full_like(tensor, torch.nan, dtype=dtype))
                  for name, tensor in expected.items()}
    load_shard([(prefix + name, parameter) for name, parameter in parameters.items()], directory, arch,
               tp_rank=tp_rank, tp_size=tp_size, layer_offset=layer_offset)
    return parameters


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("arch", [UNTIED, TIED], ids=["untied", "tied"])
def test_every_rank_gets_megatrons_layout(tmp_path, arch, tp_size):
    tensors = write_llama(arch, tmp_path, num_files=3)
    for tp_rank in range(tp_size):
        expected = megatron_parameters(tensors, arch, tp_rank=tp_rank, tp_size=tp_size, layers=range(arch.num_layers))
        found = loaded(tmp_path, arch, expected, tp_rank=tp_rank, tp_size=tp_size)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("arch", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_all_shards_gives_the_file_back(tmp_path, arch, tp_size, dtype):
    tensors = write_llama(arch, tmp_path, dtype=dtype)
    ranks = [loaded(tmp_path, arch, megatron_parameters(tensors, arch, tp_rank=rank, tp_size=tp_size,
                                                        layers=range(arch.num_layers)), tp_rank=rank, tp_size=tp_size)
             for rank in range(tp_size)]
    merged = {}
    for name in ranks[0]:
        source = parameter_source(arch, name, 0)
        arrays = source.transform.merge([to_numpy(rank[name]) for rank in ranks], arch)
        kind = "BF16" if dtype == torch.bfloat16 else "F32"
        merged |= {hf: to_torch(array, kind) for hf, array in zip(source.hf, arrays, strict=True)}
    assert merged.keys() == tensors.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("transformer_engine", [False, True])
@pytest.mark.parametrize("arch", [UNTIED, TIED], ids=["untied", "tied"])
def test_last_of_two_stages_with_wrapped_names(tmp_path, arch, transformer_engine):
    tensors = write_llama(arch, tmp_path)
    expected = megatron_parameters(tensors, arch, tp_rank=1, tp_size=2, layers=[2, 3], first=False,
                                   transformer_engine=transformer_engine)
    assert "output_layer.weight" in expected
    found = loaded(tmp_path, arch, expected, tp_rank=1, tp_size=2, layer_offset=2, prefix="module.module.")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_casts_to_the_parameters_type(tmp_path):
    tensors = write_llama(UNTIED, tmp_path, dtype=torch.bfloat16)
    expected = megatron_parameters(tensors, UNTIED, tp_rank=0, tp_size=1, layers=range(4))
    found = loaded(tmp_path, UNTIED, expected, dtype=torch.float32)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in expected.items())


def test_a_rank_reads_its_share_only(tmp_path, monkeypatch):
    write_llama(UNTIED, tmp_path)
    read = []
    close = TensorReader.close
    monkeypatch.setattr(TensorReader, "close", lambda self: read.append(self.bytes_read) or close(self))
    fc1 = torch.nn.Parameter(torch.empty(2 * 40 // 4, 24))
    load_shard([("decoder.layers.0.mlp.linear_fc1.weight", fc1)], tmp_path, UNTIED, tp_rank=3, tp_size=4,
               layer_offset=1)
    assert read == [fc1.numel() * 4]


@pytest.mark.parametrize("arch", [UNTIED, TIED], ids=["untied", "tied"])
def test_read_head(tmp_path, arch):
    tensors = write_llama(arch, tmp_path, dtype=torch.float16)
    stored = tensors["model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"]
    shards = [read_head(tmp_path, arch, tp_rank=rank, tp_size=2) for rank in range(2)]
    assert shards[0].shape == shards[1].shape
    whole = torch.cat(shards)
    assert whole.dtype == torch.float16
    assert torch.equal(whole[: arch.vocab_size], stored)
    assert not whole[arch.vocab_size :].any()


def test_vocabulary_padding_of_more_than_one_rank(tmp_path):
    arch = dataclasses.replace(UNTIED, vocab_size=5, num_query_groups=8)
    tensors = write_llama(arch, tmp_path)
    shards = [read_head(tmp_path, arch, tp_rank=rank, tp_size=4) for rank in range(4)]
    assert [len(shard) for shard in shards] == [2] * 4
    assert torch.equal(torch.cat(shards), torch.cat([tensors["lm_head.weight"], torch.zeros(3, 24)]))


def test_shape_that_does_not_fit_the_config(tmp_path):
    write_llama(UNTIED, tmp_path)
    arch = dataclasses.replace(UNTIED, hidden_size=32)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\(32,\).*\(24,\)"):
        load_shard([("decoder.final_layernorm.weight", torch.nn.Parameter(torch.zeros(32)))], tmp_path, arch,
                   tp_rank=0, tp_size=1, layer_offset=0)


def test_untied_config_over_a_tied_file(tmp_path):
    write_llama(TIED, tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        read_head(tmp_path, dataclasses.replace(TIED, tied_embeddings=False), tp_rank=0, tp_size=1)


def test_unknown_parameter_is_our_mistake(tmp_path):
    write_llama(UNTIED, tmp_path)
    with pytest.raises(AssertionError, match="linear_fc3"):
        load_shard([("decoder.layers.0.mlp.linear_fc3.weight", torch.nn.Parameter(torch.zeros(1)))], tmp_path,
                   UNTIED, tp_rank=0, tp_size=1, layer_offset=0)


def test_a_real_model_in_four_shards():
    shared = os.environ.get("MINITRON_SHARED") or Path(__file__).parents[4] / "shared/data"
    directory = Path(shared) / "stories260K-hf"
    if not directory.is_dir():
        pytest.skip("set MINITRON_SHARED to the folder that has stories260K-hf")
    arch, tensors = read_arch(directory), read_llama(directory)
    for tp_rank in range(4):
        expected = megatron_parameters(tensors, arch, tp_rank=tp_rank, tp_size=4, layers=range(arch.num_layers))
        found = loaded(directory, arch, expected, tp_rank=tp_rank, tp_size=4)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
