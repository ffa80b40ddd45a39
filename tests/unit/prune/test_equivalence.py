"""What is pruned stays right, for every family: a sliced model computes what the whole one does with units masked."""

import dataclasses
import re

import numpy as np
import pytest
import torch
import transformers

from nemo_minitron.checkpoint.families import FAMILIES as TABLES
from nemo_minitron.checkpoint.families import hf_tensors, parameter_source, read_arch, tensor_axes
from nemo_minitron.checkpoint.tensors import TensorReader
from nemo_minitron.importance.scores import Scores, tensor_shapes
from nemo_minitron.prune.plan import LayerChoice, make_plan
from nemo_minitron.prune.surgery import prune_checkpoint
from tests.support.tiny_llama import FAMILIES, UNTIED, write_model

MODELS = {"llama": UNTIED, **FAMILIES}
TARGETS = {
    "ffn": {"ffn_hidden_size": 24},
    "heads": {"num_attention_heads": 2},  # one of two heads of each group
    "groups": {"num_query_groups": 1},
    "heads and groups": {"num_query_groups": 1, "num_attention_heads": 1},
    "layers": {"num_layers": 2},
    "all but hidden": {"num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 40},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    return {name: write_model(arch, directory / name) for name, arch in MODELS.items()}


def plan_for(arch, target, seed=0, **options):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.random(shape) for name, shape in tensor_shapes(arch).items()}
    scores = Scores(source=arch, num_samples=3, samples_digest="", source_digest="", measures={}, tensors=tensors)
    return make_plan(arch, target, scores, **options)


def load(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def logits(model):
    tokens = torch.arange(60).remainder(model.config.vocab_size).view(2, 30)
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def mask(model, plan):
    """Zero what a unit adds to the residual stream, for all units that `plan` removes (hidden channels: all of it)."""
    source = plan.source
    hidden = torch.tensor([channel in plan.hidden for channel in range(source.hidden_size)])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, ~hidden] = 0
        for index, layer in enumerate(model.model.layers):
            out, down = layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight
            out[~hidden], down[~hidden] = 0, 0
            if index not in plan.layers:
                out[:], down[:] = 0, 0
                continue
            position = plan.layers.index(index)
            for head in set(range(source.num_attention_heads)) - set(plan.heads[position]):
                out[:, head * source.head_dim : (head + 1) * source.head_dim] = 0
            down[:, sorted(set(range(source.ffn_hidden_size)) - set(plan.ffn[position]))] = 0
    return hidden


@pytest.mark.parametrize("axis", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_sliced_is_masked(sources, tmp_path, name, axis):
    plan = plan_for(MODELS[name], TARGETS[axis])
    prune_checkpoint(sources[name], plan, tmp_path / "out")
    pruned, whole = load(tmp_path / "out"), load(sources[name])
    before = logits(whole)
    mask(whole, plan)
    torch.testing.assert_close(logits(pruned), logits(whole), rtol=1e-5, atol=1e-5)
    assert (logits(pruned) - before).abs().max() > 1e-2  # something was cut
    assert pruned.num_parameters() == plan.target.num_parameters()
    assert pruned.config.head_dim == plan.source.head_dim
    assert read_arch(tmp_path / "out") == plan.target


@pytest.mark.parametrize("name", MODELS)
def test_hidden_sliced_is_masked_with_norms_over_the_kept_channels(sources, tmp_path, name):
    plan = plan_for(MODELS[name], {"hidden_size": 20, "ffn_hidden_size": 40})
    prune_checkpoint(sources[name], plan, tmp_path / "out")
    pruned, whole = load(tmp_path / "out"), load(sources[name])
    kept = mask(whole, plan)
    for norm in [module for module in whole.modules() if type(module).__name__.endswith(("RMSNorm", "LayerNorm1P"))]:
        if norm.weight.numel() == kept.numel():  # not those of queries and keys
            norm.forward = over_kept(norm, kept)
    torch.testing.assert_close(logits(pruned), logits(whole), rtol=1e-5, atol=1e-5)


def over_kept(norm, kept):
    """The norm with means over the kept channels only; the others stay zero."""
    def forward(x):
        if hasattr(norm, "bias"):
            mean = x.sum(-1, keepdim=True) / kept.sum()
            x = (x - mean) * kept
            scale = (x.square().sum(-1, keepdim=True) / kept.sum() + norm.eps).rsqrt()
            return x * scale * (norm.weight + 1) * kept + norm.bias * kept
        return x * (x.square().sum(-1, keepdim=True) / kept.sum() + norm.variance_epsilon).rsqrt() * norm.weight
    return forward


@pytest.mark.parametrize("name", MODELS)
def test_units_whose_weights_are_zero_are_not_missed(sources, tmp_path, name):
    arch = MODELS[name]
    plan = plan_for(arch, TARGETS["all but hidden"])
    whole = load(sources[name])
    mask(whole, plan)
    before = logits(whole)
    whole.save_pretrained(tmp_path / "zeroed")
    prune_checkpoint(tmp_path / "zeroed", plan, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), before, rtol=0, atol=1e-6 * float(before.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_the_identity_changes_no_bit(sources, tmp_path, name):
    prune_checkpoint(sources[name], make_plan(MODELS[name], {}, None), tmp_path / "out")
    with TensorReader(sources[name]) as before, TensorReader(tmp_path / "out") as after:
        assert set(before.names) == set(after.names)
        assert all(before.read(tensor).tobytes() == after.read(tensor).tobytes() for tensor in before.names)


def shard(directory, arch, name, rank):
    """Megatron's parameter `name` of TP rank `rank` of 2."""
    source, tensors = parameter_source(arch, name, 0), tensor_axes(arch)
    with TensorReader(directory) as reader:
        return source.transform.read(reader.read, [tensors[hf] for hf in source.hf], arch, tp_rank=rank, tp_size=2)


@pytest.mark.parametrize("name", MODELS)
def test_slicing_then_sharding_is_sharding_then_slicing(sources, tmp_path, name):
    """With as many units cut on both TP ranks, each rank's shard of the pruned model is cut out of its own shard."""
    arch = MODELS[name]
    half, q, d = arch.ffn_hidden_size // 2, arch.heads_per_group, arch.head_dim
    ffn = tuple(range(3, half, 2)) + tuple(range(half + 4, arch.ffn_hidden_size, 2)) + (half,)
    ffn = tuple(sorted(ffn))[: 2 * len(range(3, half, 2))]
    heads = (0, q + 1)  # head 0 of group 0, head 1 of group 1
    base = plan_for(arch, {"hidden_size": 20, "num_attention_heads": 2, "ffn_hidden_size": len(ffn)})
    plan = dataclasses.replace(base, ffn=(ffn,) * arch.num_layers, heads=(heads,) * arch.num_layers)
    prune_checkpoint(sources[name], plan, tmp_path / "out")
    hidden = list(plan.hidden)
    for rank in (0, 1):
        local = [neuron - rank * half for neuron in ffn if neuron // half == rank]
        head = heads[rank] - rank * q
        queries = list(range(head * d, (head + 1) * d))
        cuts = {"linear_qkv": (queries + list(range(q * d, (q + 2) * d)), hidden), "linear_proj": (hidden, queries),
                "linear_fc1": ([*local, *(half + neuron for neuron in local)] if arch.activation == "swiglu" else local,
                               hidden),
                "linear_fc2": (hidden, local), "norm": (hidden, None), "embedding": (None, hidden),
                "output_layer": (None, hidden), "q_layernorm": (None, None), "k_layernorm": (None, None)}
        for row in TABLES[arch.family].parameters:
            parameter = row.megatron[0].replace("{i}", "1")
            key = next(key for key in ("q_layernorm", "k_layernorm", *cuts) if key in parameter)
            rows, columns = cuts[key]
            whole = shard(sources[name], arch, parameter, rank)
            whole = whole if rows is None else whole[rows]
            whole = whole if columns is None or whole.ndim == 1 else whole[:, columns]
            assert np.array_equal(shard(tmp_path / "out", plan.target, parameter, rank), whole), parameter


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("coefficient", [1.0, -0.5])
def test_head_residual_is_added_to_the_queries_of_paired_heads(sources, tmp_path, name, coefficient):
    arch = MODELS[name]
    plan = plan_for(arch, {"num_attention_heads": 2, "hidden_size": 20}, head_residual=coefficient)
    plain = dataclasses.replace(plan, head_pairs=(), head_residual=0.0)
    prune_checkpoint(sources[name], plan, tmp_path / "out")
    prune_checkpoint(sources[name], plain, tmp_path / "plain")
    with TensorReader(sources[name]) as source, TensorReader(tmp_path / "out") as out, \
            TensorReader(tmp_path / "plain") as without:
        for tensor, shape in hf_tensors(plan.target):
            found, before = out.read(tensor), without.read(tensor)
            queries = re.fullmatch(r"(model\.layers\.(\d+)\.self_attn\.)q_proj\.(weight|bias)", tensor)
            if queries is None:
                assert np.array_equal(found, before), tensor
                continue
            whole = source.read(tensor).reshape(arch.num_attention_heads, arch.head_dim, -1)
            whole = whole[..., list(plan.hidden)] if len(shape) == 2 else whole
            layer = int(queries[2])
            assert len(plan.head_pairs[layer]) == 2  # one in each group
            for kept, cut in plan.head_pairs[layer]:
                expected = whole[kept] + coefficient * (whole[kept] - whole[cut])
                place = plan.heads[layer].index(kept)
                rows = found.reshape(2, arch.head_dim, -1)[place]
                np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=1e-7)


def test_listed_layers_are_the_ones_that_go(sources, tmp_path):
    plan = make_plan(UNTIED, {}, None, layers=LayerChoice(drop=(1, 2)))
    prune_checkpoint(sources["llama"], plan, tmp_path / "out")
    pruned, whole = load(tmp_path / "out"), load(sources["llama"])
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[0], whole.model.layers[3]])
    torch.testing.assert_close(logits(pruned), logits(whole), rtol=0, atol=0)
