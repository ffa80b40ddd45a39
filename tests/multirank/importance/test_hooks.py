"""Scores under every layout equal plain formulas in fp64 on the activations of `transformers`' model."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.support.tiny_llama import (
    DOCUMENT_LENGTHS,
    LAYOUTS,
    UNTIED,
    formed,
    open_documents,
    open_samples,
    write_documents,
    write_model,
    write_tokens,
)

TOLERANCE = 1e-5
IDS = [0, 3, 4, 9, 10, 17, 18, 25, 31, 38, 39]  # 11: neither micro-batches of 2 nor replicas divide it
LAYERS = UNTIED.num_layers


def collect(rank, world_size, *, path, tokens, layout, micro_batch_size, out, dtype="float32", **measures):
    """A job: score the samples `IDS`; every rank writes what it got to `out`/rank."""
    from nemo_minitron.importance.hooks import collect_scores
    from nemo_minitron.model.build import load_model, transformer_config

    with formed(layout) as degrees:
        model = load_model(UNTIED, Path(path), transformer_config(UNTIED, degrees), unfused_norms=True)
        model.to(getattr(torch, dtype))
        model.config.pipeline_dtype = getattr(torch, dtype)
        scores = collect_scores(model, open_samples(tokens), np.array(IDS), layout=degrees,
                                micro_batch_size=micro_batch_size, source_digest="weights", **measures)
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    scores.save(Path(out) / str(rank))
    return {"num_samples": scores.num_samples, "digest": scores.digest(), "hooks": hooks}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hooks")
    return {"path": str(write_model(UNTIED, directory / "model")), "tokens": str(write_tokens(directory / "tokens"))}


def hooked(path, tokens, dtype):
    """Activations of all samples as fp64: norms [2L + 1, n, S, H], stream [L + 1, n, S, H], others [L, n, S, units]."""
    model = transformers.LlamaForCausalLM.from_pretrained(path, attn_implementation="sdpa").to(dtype)
    taken = {"norms": [], "post": [], "pre": [], "context": [], "stream": []}

    def outputs(name):
        return lambda module, args, output: taken[name].append(output[0] if isinstance(output, tuple) else output)

    def inputs(name):
        return lambda module, args: taken[name].append(args[0])

    if dtype == torch.float64:  # transformers' norm computes in fp32 whatever the model's type
        for norm in [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]:
            norm.forward = lambda x, norm=norm: x * (x.square().mean(-1, keepdim=True)
                                                     + norm.variance_epsilon).rsqrt() * norm.weight
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(outputs("norms"))
        layer.post_attention_layernorm.register_forward_hook(outputs("norms"))
        layer.mlp.gate_proj.register_forward_hook(outputs("pre"))
        layer.mlp.down_proj.register_forward_pre_hook(inputs("post"))
        layer.self_attn.o_proj.register_forward_pre_hook(inputs("context"))
        layer.register_forward_hook(outputs("stream"))
    model.model.norm.register_forward_hook(outputs("norms"))
    tokens = open_samples(tokens).batch(IDS).tokens
    with torch.no_grad():
        model(tokens)
        taken["stream"].insert(0, model.model.embed_tokens(tokens))
    taken = {name: torch.stack(values).double() for name, values in taken.items()}
    by_head = taken["context"].unflatten(-1, (UNTIED.num_attention_heads, UNTIED.head_dim))
    by_group = taken["context"].unflatten(-1, (UNTIED.num_query_groups, -1))
    return taken | {"heads": by_head.norm(dim=-1), "groups": by_group.norm(dim=-1)}


@pytest.fixture(scope="module")
def activations(files):
    return hooked(**files, dtype=torch.float32)


CHOICES = {  # measures -> what of the activations each axis is made of
    (): {"hidden": "norms", "ffn": "post", "head_channels": "context"},
    (("neurons", "pre_activation"), ("heads", "tokens")): {"hidden": "norms", "ffn": "pre", "heads": "heads",
                                                           "groups": "groups"},
}


def reference(activations, axes):
    """Sums over samples by name, and for each name the size that rounding is to be compared with."""
    sums, sizes = {}, {}
    for axis, name in axes.items():
        x_LnSU = activations[name]
        mean_LnU = x_LnSU.sum(2) / x_LnSU.size(2)
        var_LnU = ((x_LnSU - mean_LnU.unsqueeze(2)) ** 2).sum(2) / x_LnSU.size(2)
        statistics = {
            "mean": (x_LnSU.abs().sum(2) / x_LnSU.size(2), None),
            "l2": ((x_LnSU**2).sum(2).sqrt(), None),
            "var": (var_LnU, var_LnU + mean_LnU**2),
        }
        for name, (value, size) in statistics.items():
            size = value if size is None else size
            for moment, power in (("sum", 1), ("sum_of_squares", 2)):
                sums[f"{axis}.{name}.{moment}"] = (value**power).sum(1).numpy()
                sizes[f"{axis}.{name}.{moment}"] = (size**power).sum(1).numpy()
    before, after = activations["stream"][:-1], activations["stream"][1:]
    cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    sums["layers.block_influence"] = 1 - cosine.mean(dim=(1, 2)).numpy()
    sizes["layers.block_influence"] = np.ones(LAYERS)
    return sums, sizes


def check(scores, activations, axes, tolerance):
    sums, sizes = reference(activations, axes)
    assert scores.tensors.keys() == sums.keys()
    for name, expected in sums.items():
        error = np.abs(scores.tensors[name] - expected) / sizes[name]
        assert error.max() < tolerance, (name, error.max())
    assert np.all(sums["layers.block_influence"] > 0.01)  # the layers do something


@pytest.mark.parametrize("measures", CHOICES, ids=["default", "paper"])
@pytest.mark.parametrize(("layout", "micro_batch_size"), [
    ("1x1", 2), ("1x1", 16), ("tp2", 2), ("pp2", 2), ("tp2 sp", 2), ("dp2", 2), ("dp2", 4), ("tp2 pp2", 4),
])
def test_scores_equal_plain_formulas(rank_pool, files, activations, tmp_path, layout, micro_batch_size, measures):
    from nemo_minitron.importance.scores import Scores

    facts = rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:collect", **files, layout=layout, out=str(tmp_path),
                                                      micro_batch_size=micro_batch_size, **dict(measures))
    assert facts == [facts[0]] * LAYOUTS[layout].world_size
    assert facts[0]["num_samples"] == len(IDS) and facts[0]["hooks"] == 0
    check(Scores.load(tmp_path / "0"), activations, CHOICES[measures], TOLERANCE)


@pytest.mark.parametrize("layout", ["1x1", "tp2", "pp2", "tp2 sp", "dp2", "tp2 pp2"])
def test_in_fp64_scores_are_exact(rank_pool, files, tmp_path, layout):
    from nemo_minitron.importance.scores import Scores

    measures = next(iter(CHOICES))
    rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:collect", **files, layout=layout, out=str(tmp_path),
                                              micro_batch_size=2, dtype="float64")
    check(Scores.load(tmp_path / "0"), hooked(**files, dtype=torch.float64), CHOICES[measures], 1e-10)


def test_of_a_bf16_model_only_the_activations_are_rounded(rank_pool, files, activations, tmp_path):
    from nemo_minitron.importance.scores import Scores

    rank_pool(1).run(f"{__name__}:collect", **files, layout="1x1", out=str(tmp_path), micro_batch_size=4,
                     dtype="bfloat16")
    scores = Scores.load(tmp_path / "0")
    sums, _ = reference(activations, CHOICES[()])
    error = np.abs(scores.tensors["ffn.mean.sum"] / sums["ffn.mean.sum"] - 1)
    assert 1e-6 < np.median(error) < 0.03  # bf16 has 8 bits: 4e-3 a number


def collect_documents(rank, world_size, *, path, tokens, layout, seq_length, out):
    """A job: score all documents, one a sample filled up to `seq_length`."""
    from nemo_minitron.importance.hooks import collect_scores
    from nemo_minitron.model.build import load_model, transformer_config

    with formed(layout) as degrees:
        model = load_model(UNTIED, Path(path), transformer_config(UNTIED, degrees), unfused_norms=True)
        scores = collect_scores(model, open_documents(tokens, seq_length=seq_length, packed=False),
                                np.arange(len(DOCUMENT_LENGTHS)), layout=degrees, micro_batch_size=3,
                                source_digest="weights")
    scores.save(Path(out) / str(rank))


def test_padding_does_not_count(rank_pool, files, tmp_path):
    """Documents of 2 to 50 tokens in samples of 50 and of 64, the latter also cut over ranks."""
    from nemo_minitron.importance.scores import Scores

    prefix = write_documents(tmp_path / "documents")
    found = {}
    for layout, seq_length in [("1x1", 50), ("1x1", 64), ("tp2 sp", 64), ("dp2", 50)]:
        out = tmp_path / f"{layout} {seq_length}"
        rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:collect_documents", path=files["path"], out=str(out),
                                                  tokens=str(prefix), layout=layout, seq_length=seq_length)
        found[layout, seq_length] = Scores.load(out / "0").tensors
    expected = found.pop(("1x1", 50))
    for case, tensors in found.items():
        for name, values in expected.items():
            np.testing.assert_allclose(tensors[name], values, rtol=1e-4, atol=1e-6, err_msg=f"{case} {name}")
