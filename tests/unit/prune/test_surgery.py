"""`prune_checkpoint` against dense slicing by tensor name, and through `transformers`."""

import dataclasses
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.tensors import TensorReader, TensorWriter
from nemo_minitron.errors import CheckpointError
from nemo_minitron.importance.scores import Scores, tensor_shapes
from nemo_minitron.prune import surgery
from nemo_minitron.prune.plan import make_plan
from nemo_minitron.prune.surgery import prune_checkpoint
from tests.support.checkpoints import llama_shapes

SOURCE = ArchSpec(family="llama", num_layers=3, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4,
                  num_query_groups=2, head_dim=6, vocab_size=32, max_position_embeddings=64)
TARGET = {"num_layers": 2, "hidden_size": 10, "ffn_hidden_size": 14}
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def make_scores(source, seed=0):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.random(shape) for name, shape in tensor_shapes(source).items()}
    return Scores(source=source, num_samples=3, samples_digest="", source_digest="", measures={}, tensors=tensors)


def llama_config(arch):
    return transformers.LlamaConfig(
        num_hidden_layers=arch.num_layers, hidden_size=arch.hidden_size, intermediate_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads, num_key_value_heads=arch.num_query_groups,
        head_dim=arch.head_dim, vocab_size=arch.vocab_size, max_position_embeddings=arch.max_position_embeddings,
        rms_norm_eps=arch.norm_eps, rope_theta=arch.rope.theta, tie_word_embeddings=arch.tied_embeddings,
        architectures=["LlamaForCausalLM"], torch_dtype="float32")


def write_random_checkpoint(directory, arch, dtype=np.float32, seed=0):
    """A Llama directory without tokenizer; returns its tensors."""
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in llama_shapes(arch).items()}
    directory.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(llama_config(arch).to_json_string(use_diff=False))
    return tensors


def cut_by_name(tensors, plan):
    """What must come out: the plan applied with numpy, tensor name by tensor name."""
    hidden = list(plan.hidden)
    out = {name: tensors[name][..., hidden] for name in
           ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight") if name in tensors}
    for name, tensor in tensors.items():
        match = LAYER_NAME.fullmatch(name)
        if match is None or int(match[1]) not in plan.layers:
            continue
        new_layer = plan.layers.index(int(match[1]))
        ffn = list(plan.ffn[new_layer])
        cut = {
            "mlp.gate_proj": lambda t, ffn=ffn: t[ffn][:, hidden], "mlp.up_proj": lambda t, ffn=ffn: t[ffn][:, hidden],
            "mlp.down_proj": lambda t, ffn=ffn: t[hidden][:, ffn], "self_attn.o_proj": lambda t: t[hidden],
        }.get(match[2], lambda t: t[..., hidden])
        out[f"model.layers.{new_layer}.{match[2]}.weight"] = cut(tensor)
    return out


def read_all(directory):
    with TensorReader(directory) as reader:
        return {name: reader.read(name) for name in reader.names}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert actual[name].tobytes() == np.ascontiguousarray(tensor).tobytes(), name


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def load(directory):
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


@st.composite
def sources_and_targets(draw):
    groups = draw(st.integers(1, 2))
    source = ArchSpec(family="llama", num_layers=draw(st.integers(1, 3)), hidden_size=draw(st.integers(1, 9)),
                      ffn_hidden_size=draw(st.integers(1, 9)), num_attention_heads=groups * draw(st.integers(1, 2)),
                      num_query_groups=groups, head_dim=2 * draw(st.integers(1, 2)), vocab_size=draw(st.integers(1, 9)),
                      tied_embeddings=draw(st.booleans()))
    target = {key: draw(st.integers(1, getattr(source, key))) for key in TARGET}
    return source, target


@given(sources_and_targets(), st.sampled_from([1, 200, 2**30]))
@settings(max_examples=12, deadline=None)  # each writes two checkpoints
def test_every_tensor_is_the_slice_the_plan_says(drawn, shard_bytes):
    source, target = drawn
    with tempfile.TemporaryDirectory() as name:
        tensors = write_random_checkpoint(Path(name) / "source", source)
        plan = make_plan(source, target, make_scores(source))
        prune_checkpoint(Path(name) / "source", plan, Path(name) / "out", shard_bytes=shard_bytes)
        written = read_all(Path(name) / "out")
    assert {name: tensor.shape for name, tensor in written.items()} == llama_shapes(plan.target)
    assert sum(tensor.size for tensor in written.values()) == plan.target.num_parameters()
    assert_same_bits(written, cut_by_name(tensors, plan))


@pytest.mark.parametrize("block_bytes", [1, 100, 2**20])
def test_block_size_does_not_matter(tmp_path, monkeypatch, block_bytes):
    tensors = write_random_checkpoint(tmp_path / "source", SOURCE)
    plan = make_plan(SOURCE, TARGET, make_scores(SOURCE))
    monkeypatch.setattr(surgery, "BLOCK_BYTES", block_bytes)
    prune_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    assert_same_bits(read_all(tmp_path / "out"), cut_by_name(tensors, plan))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("target", [{}, TARGET])
def test_type_and_bits_are_kept(tmp_path, dtype, target):
    numpy_dtype = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    rng = np.random.default_rng(1)
    itemsize = np.dtype(numpy_dtype).itemsize
    raw = {name: rng.integers(0, 256, (*shape, itemsize), dtype=np.uint8).view(numpy_dtype)[..., 0]
           for name, shape in llama_shapes(SOURCE).items()}  # any bit pattern, NaNs of all kinds included
    source = tmp_path / "source"
    with TensorWriter(source, [(name, dtype, tensor.shape) for name, tensor in raw.items()]) as writer:
        for name, tensor in raw.items():
            writer.write(name, tensor)
    (source / "config.json").write_text(llama_config(SOURCE).to_json_string(use_diff=False))
    plan = make_plan(SOURCE, target, make_scores(SOURCE))
    prune_checkpoint(source, plan, tmp_path / "out")
    assert_same_bits(read_all(tmp_path / "out"), cut_by_name(raw, plan))
    with TensorReader(tmp_path / "out") as reader:
        assert {reader.dtype(name) for name in reader.names} == {dtype}


def test_identity_changes_no_bit_and_no_logit(tmp_path):
    torch.manual_seed(0)
    teacher = transformers.LlamaForCausalLM(llama_config(SOURCE)).eval()
    teacher.save_pretrained(tmp_path / "source")
    prune_checkpoint(tmp_path / "source", make_plan(SOURCE, {}, None), tmp_path / "out")
    assert_same_bits(read_all(tmp_path / "out"), read_all(tmp_path / "source"))
    tokens = torch.arange(10)[None]
    assert torch.equal(logits_of(load(tmp_path / "out"), tokens), logits_of(load(tmp_path / "source"), tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_pruned_model_loads_in_transformers(tmp_path, tied):
    source = dataclasses.replace(SOURCE, tied_embeddings=tied)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(llama_config(source)).save_pretrained(tmp_path / "source")
    plan = make_plan(source, TARGET, make_scores(source))
    prune_checkpoint(tmp_path / "source", plan, tmp_path / "out", shard_bytes=3000,
                     extra_config={"nemo_minitron": {"tokens_seen": 7}})
    model = load(tmp_path / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.target.num_parameters()
    assert model.config.head_dim == source.head_dim
    assert model.config.hidden_size == 10
    assert model.config.nemo_minitron == {"tokens_seen": 7}
    assert torch.isfinite(logits_of(model, torch.arange(10)[None])).all()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert not (tmp_path / "out.partial").exists()


def test_removing_neurons_with_zero_weights_keeps_the_logits(tmp_path):
    torch.manual_seed(0)
    teacher = transformers.LlamaForCausalLM(llama_config(SOURCE)).eval()
    rng = np.random.default_rng(5)
    per_neuron = np.ones((3, 24))
    for layer, block in enumerate(teacher.model.layers):
        dead = rng.permutation(24)[:10]
        per_neuron[layer, dead] = 0
        with torch.no_grad():
            for weight in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight.T):
                weight[torch.tensor(dead)] = 0
    teacher.save_pretrained(tmp_path / "source")
    scores = dataclasses.replace(make_scores(SOURCE), tensors={
        "ffn.mean.sum": per_neuron, "ffn.mean.sum_of_squares": per_neuron})
    prune_checkpoint(tmp_path / "source", make_plan(SOURCE, {"ffn_hidden_size": 14}, scores), tmp_path / "out")
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(logits_of(load(tmp_path / "out"), tokens), logits_of(teacher, tokens),
                               rtol=0, atol=1e-6)  # only the order of FP32 sums over ffn may differ


def test_removing_layers_that_add_nothing_keeps_the_logits(tmp_path):
    torch.manual_seed(0)
    teacher = transformers.LlamaForCausalLM(llama_config(SOURCE)).eval()
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight.zero_()
        teacher.model.layers[1].self_attn.o_proj.weight.zero_()
    teacher.save_pretrained(tmp_path / "source")
    scores = dataclasses.replace(make_scores(SOURCE), tensors={"layers.block_influence": np.array([0.2, 0.0, 0.1])})
    prune_checkpoint(tmp_path / "source", make_plan(SOURCE, {"num_layers": 2}, scores), tmp_path / "out")
    tokens = torch.arange(20)[None]
    assert torch.equal(logits_of(load(tmp_path / "out"), tokens), logits_of(load(tmp_path / "source"), tokens))


def test_removing_zero_hidden_channels_only_rescales_the_norms(tmp_path):
    """RMSNorm divides by the hidden size, so it shrinks by sqrt(10/16) when 6 zero channels of 16 go."""
    torch.manual_seed(0)
    teacher = transformers.LlamaForCausalLM(llama_config(SOURCE)).eval()
    dead = [1, 4, 5, 9, 12, 15]
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:, dead] = 0
        for block in teacher.model.layers:
            block.self_attn.o_proj.weight[dead] = 0
            block.mlp.down_proj.weight[dead] = 0
    teacher.save_pretrained(tmp_path / "source")
    per_channel = np.ones((6, 16))
    per_channel[:, dead] = 0
    scores = dataclasses.replace(make_scores(SOURCE), tensors={
        "hidden.mean.sum": per_channel, "hidden.mean.sum_of_squares": per_channel})
    prune_checkpoint(tmp_path / "source", make_plan(SOURCE, {"hidden_size": 10}, scores), tmp_path / "out")
    student = load(tmp_path / "out")
    with torch.no_grad():
        for module in student.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.weight *= (16 / 10) ** 0.5
                module.variance_epsilon *= 16 / 10
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(logits_of(student, tokens), logits_of(teacher, tokens), rtol=0, atol=1e-6)


def test_tokenizer_files_come_along(tmp_path):
    write_random_checkpoint(tmp_path / "source", SOURCE)
    (tmp_path / "source" / "tokenizer_config.json").write_text('{"a": 1}')
    (tmp_path / "source" / "optimizer.pt").write_bytes(b"x")
    prune_checkpoint(tmp_path / "source", make_plan(SOURCE, {}, None), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_failure_leaves_nothing_behind(tmp_path):
    tensors = write_random_checkpoint(tmp_path / "source", SOURCE)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        prune_checkpoint(tmp_path / "source", make_plan(SOURCE, {}, None), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_plan_for_another_model_is_refused(tmp_path):
    write_random_checkpoint(tmp_path / "source", SOURCE)
    plan = make_plan(dataclasses.replace(SOURCE, ffn_hidden_size=20), {}, None)
    with pytest.raises(CheckpointError, match="expected ffn_hidden_size 20; found ffn_hidden_size 24"):
        prune_checkpoint(tmp_path / "source", plan, tmp_path / "out")


def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path):
    tensors = write_random_checkpoint(tmp_path / "source", SOURCE)
    tensors["model.norm.weight"] = np.ones(17, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*expected shape \(16,\); found shape \(17,\)"):
        prune_checkpoint(tmp_path / "source", make_plan(SOURCE, {}, None), tmp_path / "out")


def test_earlier_output_is_replaced_and_the_source_never(tmp_path):
    write_random_checkpoint(tmp_path / "source", SOURCE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"old")
    prune_checkpoint(tmp_path / "source", make_plan(SOURCE, {}, None), tmp_path / "out")
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    before = (tmp_path / "source" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="output directory"):
        prune_checkpoint(tmp_path / "source", make_plan(SOURCE, {}, None), tmp_path / "source")
    assert (tmp_path / "source" / "model.safetensors").read_bytes() == before


def test_tensor_the_family_does_not_know_is_not_dropped_silently(tmp_path):
    tensors = write_random_checkpoint(tmp_path / "source", SOURCE)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
        prune_checkpoint(tmp_path / "source", make_plan(SOURCE, {}, None), tmp_path / "out")


def test_rotary_frequencies_and_the_copy_of_a_tied_embedding_are_left_out(tmp_path):
    source = dataclasses.replace(SOURCE, tied_embeddings=True)
    tensors = write_random_checkpoint(tmp_path / "source", source)
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"],
             "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    safetensors.numpy.save_file({**tensors, **extra}, tmp_path / "source" / "model.safetensors")
    prune_checkpoint(tmp_path / "source", make_plan(source, {}, None), tmp_path / "out")
    assert_same_bits(read_all(tmp_path / "out"), tensors)


def test_config_says_the_target_shape(tmp_path):
    write_random_checkpoint(tmp_path / "source", SOURCE)
    prune_checkpoint(tmp_path / "source", make_plan(SOURCE, TARGET, make_scores(SOURCE)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"], config["head_dim"]) == (
        2, 10, 14, 6)
