"""Depth metrics under every layout equal `transformers` models from which the layers were really taken out."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from tests.support.tiny_llama import LAYOUTS, UNEVEN, UNTIED, formed, open_samples, write_model, write_tokens

IDS = [0, 3, 4, 9, 10, 17, 40]  # the last one is partial
LAYERS = UNTIED.num_layers
ARCHS = {"even": UNTIED, "uneven": UNEVEN, "deep": dataclasses.replace(UNTIED, num_layers=12)}
OPTIONS = [((1, 5, 7, 30, 60), 2), ((1, 5, 9, 30, 60), 2), ((1, 44, 3), 1), ((1, 44, 80), 1), ((1, 44, 81), 1)]
SHARES = [0.1, 0.5, 0.02, 1.0, 0.2, 0.05, 0.6, 0.3, 0.15, 0.8, 0.4, 0.7]  # of the deep model's layers
ANSWERS = [(2, 1), (3, 0)]  # options, right one


def questions_and_options():
    from nemo_minitron.evaluate.choices import Option
    from nemo_minitron.evaluate.questions import Question

    return ([Question((("", ""),) * count, answer) for count, answer in ANSWERS],
            [Option(tokens, count) for tokens, count in OPTIONS])


def scan(rank, world_size, *, path, tokens, layout, micro_batch_size, arch="even", **wanted):
    """A job: the scan's tensors as lists, its counts and lines, the MLPs really run, and traces left in the model."""
    from nemo_minitron.importance.depth import scan_depth
    from nemo_minitron.model.build import load_model, transformer_config

    questions, options = questions_and_options()
    run, lines = [], []
    with formed(layout) as degrees:
        model = load_model(ARCHS[arch], Path(path), transformer_config(ARCHS[arch], degrees))
        model.train()
        for layer in model.decoder.layers:
            layer.mlp.register_forward_hook(lambda *_: run.append(1))
        found = scan_depth(model, open_samples(tokens), np.array(IDS), layout=degrees, questions=questions,
                           options=options, micro_batch_size=micro_batch_size, chunk_tokens=24, say=lines.append,
                           **wanted)
        layers = list(model.decoder.layers)
    traces = sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) + ("forward" in vars(layer))
                 + (not layer.training) for layer in layers)
    return {"tensors": {name: tensor.tolist() for name, tensor in found.tensors.items()}, "lines": lines,
            "forwards": [found.layer_forwards, found.naive_layer_forwards], "run": len(run), "traces": traces}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return str(write_tokens(tmp_path_factory.mktemp("tokens") / "tokens"))


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokens):
    return {"path": str(write_model(UNTIED, tmp_path_factory.mktemp("depth") / "model")), "tokens": tokens}


@pytest.fixture(scope="module")
def whole(files):
    return transformers.LlamaForCausalLM.from_pretrained(files["path"], attn_implementation="eager")


def without(model, dropped):
    smaller = copy.deepcopy(model)
    smaller.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(smaller.model.layers) if index not in dropped)
    return smaller


@torch.no_grad()
def measured(model, dropped, files):
    """Loss, normalised squared error of the logits and accuracy without `dropped`."""
    batch = open_samples(files["tokens"]).batch(IDS)
    mask = batch.loss_mask.bool()
    smaller = without(model, dropped)
    full, logits = (net(batch.tokens, use_cache=False).logits[mask].double() for net in (model, smaller))
    loss = torch.nn.functional.cross_entropy(logits, batch.labels[mask])
    nats = []
    for tokens, count in OPTIONS:
        log_probs = smaller(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)
        nats.append(-sum(float(log_probs[place - 1, tokens[place]])
                         for place in range(len(tokens) - count, len(tokens))))
    right = [int(np.argmin(nats[:2])) == 1, int(np.argmin(nats[2:])) == 0]
    return float(loss), float((logits - full).square().sum() / full.square().sum()), float(np.mean(right))


@pytest.fixture(scope="module")
def expected(files, whole):
    tensors = {}
    for length in (0, 1, 2):
        found = [measured(whole, range(start, start + length), files)
                 for start in range(LAYERS - length + 1 if length else 1)]
        for metric, values in zip(("loss", "logit_mse", "accuracy"), zip(*found, strict=True), strict=True):
            tensors[f"layers.{metric}.{length}"] = values
    del tensors["layers.logit_mse.0"]
    return tensors


@pytest.mark.parametrize(("layout", "micro_batch_size"), [
    ("1x1", 3), ("tp2", 3), ("pp2", 3), ("tp2 sp", 2), ("dp2", 2), ("dp2", 3), ("tp2 pp2", 4),
])  # dp2 with 3: the second replica's last turn has no samples
def test_metrics_are_those_of_smaller_models(rank_pool, files, expected, layout, micro_batch_size):
    results = rank_pool(LAYOUTS[layout].world_size).run(
        f"{__name__}:scan", **files, layout=layout, micro_batch_size=micro_batch_size,
        metrics=["loss", "logit_mse", "accuracy"], block_lengths=[1, 2])
    for found in results:
        assert found["tensors"].keys() == expected.keys()
        assert found["traces"] == 0
        for name, values in expected.items():
            np.testing.assert_allclose(found["tensors"][name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    assert len(set(expected["layers.accuracy.1"]) | set(expected["layers.accuracy.2"])) > 1  # it distinguishes


@pytest.fixture(scope="module")
def deep(tmp_path_factory, tokens):
    """Files of the deep model, and its layers in the order of removal by brute force.

    Layers add unequally to the residual stream: of equal ones the last would go first, and nothing that comes after
    a removed layer would ever be measured.
    """
    path = write_model(ARCHS["deep"], tmp_path_factory.mktemp("deep") / "model")
    for file in path.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor *= SHARES[int(name.split(".")[2])]
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    model = transformers.LlamaForCausalLM.from_pretrained(path, attn_implementation="eager")
    files, gone, num_layers = {"path": str(path), "tokens": tokens}, [], ARCHS["deep"].num_layers
    while len(gone) < num_layers - 1:
        errors = {layer: measured(model, [*gone, layer], files)[1] for layer in range(num_layers) if layer not in gone}
        best, second = sorted(errors.values())[:2]
        assert second > best * (1 + 1e-4)  # no matter of rounding
        gone.append(min(errors, key=errors.get))
    assert sum(layer > min(gone[:place]) for place, layer in enumerate(gone) if place) > 5
    return files, gone


@pytest.mark.parametrize("layout", ["1x1", "pp2", "dp2"])
def test_layers_go_in_the_order_of_brute_force(rank_pool, deep, layout):
    files, gone = deep
    results = rank_pool(LAYOUTS[layout].world_size).run(
        f"{__name__}:scan", **files, layout=layout, micro_batch_size=4, arch="deep", metrics=[],
        block_lengths=[99], iterative=True)  # lengths are the metrics' alone
    positions = [gone.index(layer) if layer in gone else len(gone) for layer in range(len(gone) + 1)]
    for found in results:
        assert found["tensors"] == {"layers.logit_mse.removal_order": positions}


def test_stages_of_unequal_length(rank_pool, tmp_path, tokens):
    files = {"path": str(write_model(UNEVEN, tmp_path / "model")), "tokens": tokens}
    whole = transformers.LlamaForCausalLM.from_pretrained(files["path"], attn_implementation="eager")
    results = rank_pool(2).run(f"{__name__}:scan", **files, layout="pp2", micro_batch_size=3, arch="uneven",
                               metrics=["logit_mse"], block_lengths=[2, 1])
    for found in results:
        assert found["tensors"].keys() == {"layers.logit_mse.1", "layers.logit_mse.2"}
        for length in (1, 2):
            expected = [measured(whole, range(start, start + length), files)[1] for start in range(4 - length)]
            np.testing.assert_allclose(found["tensors"][f"layers.logit_mse.{length}"], expected, rtol=1e-5)


@pytest.mark.parametrize("wanted", [
    {"metrics": ["loss"]}, {"metrics": ["loss", "logit_mse"], "block_lengths": [1, 3]}, {"metrics": ["logit_mse"]},
    {"metrics": ["accuracy"], "block_lengths": [2]}, {"metrics": [], "iterative": True},
], ids=["loss", "both", "logit_mse", "accuracy", "iterative"])
@pytest.mark.parametrize("layout", ["1x1", "pp2", "dp2"])
def test_layer_forwards_are_those_really_run(rank_pool, files, layout, wanted):
    results = rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:scan", **files, layout=layout,
                                                        micro_batch_size=2, **wanted)
    for found in results:
        assert found["forwards"][0] == sum(rank["run"] for rank in results)
        assert " ETA 0 s" in found["lines"][-1] or "last layer" in found["lines"][-1]


@pytest.mark.parametrize("length", [1, 4])
def test_shared_prefixes_cost_half(rank_pool, deep, length):
    batches, layers = 2, ARCHS["deep"].num_layers  # 7 samples, 4 at a time
    (found,) = rank_pool(1).run(f"{__name__}:scan", **deep[0], layout="1x1", micro_batch_size=4, arch="deep",
                                metrics=["loss"], block_lengths=[length])
    after = [layers - start - length for start in range(layers - length + 1)]
    naive = layers + len(after) * (layers - length)
    assert found["forwards"] == [batches * (layers + sum(after)), batches * naive]
    assert found["forwards"][0] / batches <= naive / 2 + layers


def test_nothing_is_shared_on_two_stages(rank_pool, files):
    batches, naive = 4, LAYERS + LAYERS * (LAYERS - 1)  # 7 samples, 2 at a time
    for metrics in (["loss"], ["loss", "logit_mse"]):  # the whole model runs once for both
        (found, _) = rank_pool(2).run(f"{__name__}:scan", **files, layout="pp2", micro_batch_size=2, metrics=metrics)
        assert found["forwards"] == [batches * naive, batches * naive]
