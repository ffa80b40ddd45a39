"""Depth metrics under every layout equal `transformers` models from which the layers were really taken out."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.support.tiny_llama import LAYOUTS, UNTIED, formed, open_samples, write_model, write_tokens

IDS = [0, 3, 4, 9, 10, 17, 40]  # the last one is partial
LAYERS = UNTIED.num_layers
OPTIONS = [((1, 5, 7, 30, 60), 2), ((1, 5, 9, 30, 60), 2), ((1, 44, 3), 1), ((1, 44, 80), 1), ((1, 44, 81), 1)]
ANSWERS = [(2, 1), (3, 0)]  # options, right one


def questions_and_options():
    from nemo_minitron.evaluate.choices import Option
    from nemo_minitron.evaluate.questions import Question

    return ([Question((("", ""),) * count, answer) for count, answer in ANSWERS],
            [Option(tokens, count) for tokens, count in OPTIONS])


def scan(rank, world_size, *, path, tokens, layout, micro_batch_size, **wanted):
    """A job: the scan's tensors as lists, and its counts."""
    from nemo_minitron.importance.depth import scan_depth
    from nemo_minitron.model.build import load_model, transformer_config

    questions, options = questions_and_options()
    with formed(layout) as degrees:
        model = load_model(UNTIED, Path(path), transformer_config(UNTIED, degrees))
        found = scan_depth(model, open_samples(tokens), np.array(IDS), layout=degrees, questions=questions,
                           options=options, micro_batch_size=micro_batch_size, chunk_tokens=24, **wanted)
    return {"tensors": {name: tensor.tolist() for name, tensor in found.tensors.items()},
            "forwards": [found.layer_forwards, found.naive_layer_forwards]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("depth")
    return {"path": str(write_model(UNTIED, directory / "model")), "tokens": str(write_tokens(directory / "tokens"))}


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
    ("1x1", 3), ("tp2", 3), ("pp2", 3), ("tp2 sp", 2), ("dp2", 2), ("tp2 pp2", 4),
])
def test_metrics_are_those_of_smaller_models(rank_pool, files, expected, layout, micro_batch_size):
    results = rank_pool(LAYOUTS[layout].world_size).run(
        f"{__name__}:scan", **files, layout=layout, micro_batch_size=micro_batch_size,
        metrics=["loss", "logit_mse", "accuracy"], block_lengths=[1, 2])
    for found in results:
        assert found["tensors"].keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found["tensors"][name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    assert len(set(expected["layers.accuracy.1"]) | set(expected["layers.accuracy.2"])) > 1  # it distinguishes


@pytest.mark.parametrize("layout", ["1x1", "pp2", "dp2"])
def test_layers_go_in_the_order_of_brute_force(rank_pool, files, whole, layout):
    gone = []
    while len(gone) < LAYERS - 1:
        left = [layer for layer in range(LAYERS) if layer not in gone]
        gone.append(min(left, key=lambda layer: measured(whole, [*gone, layer], files)[1]))
    (found, *_) = rank_pool(LAYOUTS[layout].world_size).run(
        f"{__name__}:scan", **files, layout=layout, micro_batch_size=2, metrics=[], iterative=True)
    positions = [gone.index(layer) if layer in gone else LAYERS - 1 for layer in range(LAYERS)]
    assert found["tensors"] == {"layers.logit_mse.removal_order": positions}


def test_prefixes_are_shared_on_one_stage_and_not_on_two(rank_pool, files):
    batches = 4  # 7 samples, 2 at a time
    counts = {}
    for layout in ("1x1", "pp2"):
        (found, *_) = rank_pool(LAYOUTS[layout].world_size).run(
            f"{__name__}:scan", **files, layout=layout, micro_batch_size=2, metrics=["loss"])
        counts[layout] = found["forwards"]
    naive = LAYERS + LAYERS * (LAYERS - 1)
    assert counts["1x1"] == [batches * (LAYERS + sum(range(LAYERS))), batches * naive]
    assert counts["pp2"] == [batches * naive, batches * naive]
