"""Intermediate losses: values and gradients are those of `transformers` models, and the same under every layout."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.support.tiny_llama import TIED, UNEVEN, UNTIED, formed, open_samples, write_model
from tests.support.trainings import (
    STEPS,
    assert_same_numbers,
    assert_same_weights,
    lines,
    remembered,
    run,
    write_files,
)

# On two stages the teacher (2 layers) and the student (4) have these on stages 1:1, 1:1, 1:0, 0:0 and 0:1.
TERMS = [
    {"state": "hidden", "teacher_layer": 0, "student_layer": 1},
    {"state": "hidden", "teacher_layer": 1, "student_layer": 3, "loss": "mse", "weight": 0.5},
    {"state": "mlp_input", "teacher_layer": 1, "student_layer": 0},
    {"state": "embedding"},
    {"state": "attention", "teacher_layer": 0, "student_layer": 3, "weight": 2.0},
]
FEWER = [{**term, "student_layer": min(term.get("student_layer", 0), 2)} for term in TERMS]
SAME_WIDTH = dataclasses.replace(UNTIED, num_layers=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("intermediate"), tied=TIED, uneven=UNEVEN)


@pytest.fixture(scope="module")
def trained(files, rank_pool):
    get = remembered(files, rank_pool, train={"eval_every_steps": 2})
    return lambda layout, name="tied", **options: get(layout, name, terms=TERMS if name == "tied" else FEWER,
                                                      **options)[0]


def test_the_terms_are_measured_and_trained(trained):
    """Each falls; alpha is the ratio of the step before; held-out lines have the terms too."""
    steps, _ = lines(trained("1x1"), "kd")
    names = ("hidden_0_1", "hidden_1_3", "mlp_input_1_0", "embedding", "attention_0_3")
    assert all(steps[STEPS][name] < steps[1][name] for name in names)
    assert steps[1]["alpha"] == 1.0
    for step in range(2, STEPS + 1):
        before = steps[step - 1]
        assert steps[step]["alpha"] == pytest.approx(before["logits_loss"] / before["intermediate"], rel=1e-12)
        now = steps[step]
        assert now["loss"] == pytest.approx(now["logits_loss"] + now["alpha"] * now["intermediate"], rel=1e-12)
        weights = (1.0, 0.5, 1.0, 1.0, 2.0)
        assert now["intermediate"] == pytest.approx(sum(w * now[name] for w, name in zip(weights, names, strict=True)))
    looks = [line for line in metric_lines(trained("1x1")) if "heldout_ce" in line]
    measured = {f"heldout_{name}" for name in (*names, "kl", "teacher_ce", "agreement")}
    assert len(looks) == 3 and all(measured <= look.keys() for look in looks)


def metric_lines(out):
    import json

    return [json.loads(line) for line in (out / "kd" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("layout", "name"), [("tp2", "tied"), ("pp2", "tied"), ("tp2 sp", "tied"), ("dp2", "tied"),
                                              ("pp2", "uneven"), ("tp2 pp2", "tied")])
def test_every_layout_gives_the_same(trained, layout, name):
    """Losses, terms, gradient norms at each step, held-out means, and the weights at the end."""
    out, expected = trained(layout, name), trained("1x1", name)
    assert_same_numbers(out, expected, "kd")
    assert_same_weights(out, expected, "kd")
    for found, other in zip(metric_lines(out), metric_lines(expected), strict=True):
        assert {key: value for key, value in found.items() if key.startswith("heldout")} == pytest.approx(
            {key: value for key, value in other.items() if key.startswith("heldout")}, abs=1e-5)


def test_a_fixed_alpha_stays(trained):
    steps, _ = lines(trained("1x1", alpha=0.25), "kd")
    assert {step["alpha"] for step in steps.values()} == {0.25}


@pytest.mark.parametrize("layout", ["1x1", "pp2"])
def test_an_interrupted_training_goes_on_to_the_same_bits(files, rank_pool, trained, tmp_path, layout):
    """The projection and alpha come back from the resume point; neither is in the exported checkpoint."""
    out = tmp_path / "out"
    for interrupt in (True, False):
        run(files, rank_pool, layout, "tied", ["kd"], out, save=True, interrupt=interrupt, terms=TERMS)
    assert_same_numbers(out, trained(layout), "kd", tolerance=0)
    assert_same_weights(out, trained(layout), "kd", tolerance=0)


def test_gradients_are_those_of_transformers(files, rank_pool):
    teacher = str(write_model(SAME_WIDTH, files["directory"] / "same_width", seed=4))
    (worst,) = rank_pool(1).run(f"{__name__}:against_transformers", student=files["tied"], teacher=teacher,
                                tokens=files["tokens"])
    assert worst["value"] < 1e-6 and worst["gradient"] < 1e-5


def against_transformers(rank, world_size, *, student, teacher, tokens):
    """A job: largest difference of the terms' sum and of its gradients from autograd through `transformers`."""
    import transformers

    from nemo_minitron.checkpoint.digest import read_checkpoint
    from nemo_minitron.distill.intermediate import IntermediateLosses
    from nemo_minitron.distill.layer_map import Term
    from nemo_minitron.distill.teacher import Teacher
    from nemo_minitron.model.build import load_model, transformer_config

    terms = [Term(**term) for term in TERMS]
    batch = open_samples(tokens).batch([3, 40])  # the second is partial
    with formed("1x1") as layout:
        source, own = read_checkpoint(Path(teacher)), read_checkpoint(Path(student))
        placed = Teacher(source.arch, source.path, layout, terms=terms, student_layers=own.arch.num_layers)
        model = load_model(own.arch, own.path, transformer_config(own.arch, layout))
        losses = IntermediateLosses(terms, alpha=0.5, relation_heads=2)
        losses.attach_to(model, teacher_size=source.arch.hidden_size)
        with losses.comparing(placed.hand_over(batch).states, batch):
            hidden = model(batch.tokens, batch.position_ids, None)
        (0.0 * hidden).sum().backward()
        value = losses.take_means(float(batch.loss_mask.sum()))["intermediate"]
        found = {name: parameter.grad for name, parameter in model.named_parameters()}

    states = [hf_states(transformers.LlamaForCausalLM.from_pretrained(path), batch.tokens)
              for path in (student, teacher)]
    (own_states, reference), (other_states, _) = states
    total = sum(term.weight * expected_term(term, own_states, other_states, batch.loss_mask) for term in terms)
    (0.5 * total).backward()
    names = {"embedding.word_embeddings.weight": "model.embed_tokens.weight",
             "decoder.layers.2.input_layernorm.weight": "model.layers.2.input_layernorm.weight",
             "decoder.final_layernorm.weight": "model.norm.weight",
             "decoder.layers.0.mlp.linear_fc2.weight": "model.layers.0.mlp.down_proj.weight",
             "decoder.layers.1.self_attention.linear_proj.weight": "model.layers.1.self_attn.o_proj.weight"}
    parameters = dict(reference.named_parameters())
    off = max(float((found[ours] - parameters[theirs].grad).norm() / parameters[theirs].grad.norm())
              for ours, theirs in names.items())
    expected = float(total / batch.loss_mask.sum())
    return {"value": abs(value - expected) / expected, "gradient": off}


def hf_states(model, tokens):
    """States of a `transformers` Llama by (state, layer), with gradient, and the model."""
    found = {}
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: found.update({("embedding", 0): out}))
    for index, layer in enumerate(model.model.layers):
        if index:
            layer.input_layernorm.register_forward_hook(
                lambda module, args, out, index=index: found.update({("hidden", index - 1): out}))
        layer.post_attention_layernorm.register_forward_hook(
            lambda module, args, out, index=index: found.update({("mlp_input", index): out}))
    model.model.norm.register_forward_hook(
        lambda module, args, out: found.update({("hidden", model.config.num_hidden_layers - 1): out}))
    import transformers.models.llama.modeling_llama as llama

    original, layer = llama.apply_rotary_pos_emb, iter(range(model.config.num_hidden_layers))
    values = {}
    for index, block in enumerate(model.model.layers):
        block.self_attn.v_proj.register_forward_hook(
            lambda module, args, out, index=index: values.update({index: out}))

    def rotated(query, key, *args, **kwargs):
        query, key = original(query, key, *args, **kwargs)
        found["attention", next(layer)] = [states.transpose(1, 2).flatten(2) for states in (query, key)]
        return query, key

    llama.apply_rotary_pos_emb = rotated
    try:
        model(tokens)
    finally:
        llama.apply_rotary_pos_emb = original
    for index, value in values.items():
        found["attention", index].append(value)
    return found, model


def expected_term(term, own, other, mask_BS):
    """Sum over valid tokens of one term, written out per token."""
    mine, theirs = own[term.state, term.student_layer], other[term.state, term.teacher_layer]
    total = 0.0
    for row, column in mask_BS.nonzero().tolist():
        if term.state != "attention":
            a, b = mine[row, column], theirs[row, column].detach()
            total = total + ((a - b) ** 2).mean() if term.loss == "mse" else total + 1 - a @ b / (a.norm() * b.norm())
            continue
        for a, b in zip(mine, theirs, strict=True):
            for head in range(2):
                rows = []
                for states in (a, b.detach()):
                    parts = states[row].chunk(2, dim=-1)[head]
                    scores = parts[: column + 1] @ parts[column] / parts.shape[-1] ** 0.5
                    rows.append(torch.log_softmax(scores, -1))
                total = total + (rows[1].exp() * (rows[1] - rows[0])).sum() / 2
    return total
