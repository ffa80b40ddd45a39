"""One whole run of the command, what it leaves behind, and what the next run does and does not do again."""

import json
import math
import re

import pytest
import torch
import transformers

from nemo_minitron.checkpoint.families import read_arch
from nemo_minitron.checkpoint.tensors import TensorReader
from tests.e2e.command import BATCH, NUM_STEPS, SEQ_LENGTH, TOKENS, manifests, run_well, summary

STAGES = ["score", "prune", "distill", "evaluate", "report"]
MODEL_FIELDS = {"path", "loss", "bits_per_byte", "num_parameters", "num_non_embedding_parameters", "tokens", "seconds",
                "tokens_per_s"}


def stages_run(finished):
    """The stages that a command says it ran, in order."""
    return [line.removeprefix("== ") for line in finished.stdout.splitlines() if line.startswith("== ")]


def heldout_stream(inputs, tokenizer, num_documents=4):
    """Tokens of the last documents, one leading bos each, by the tokenizer alone."""
    files = sorted(inputs.text.glob("*.txt"))[-num_documents:]
    return torch.tensor([token for file in files
                         for token in [tokenizer.bos_token_id, *tokenizer(file.read_text())["input_ids"]]])


def reference_loss(model, stream):
    """Nats per predicted token, sample by sample, in `transformers`."""
    total = 0.0
    for first in range(0, len(stream) - 1, SEQ_LENGTH):
        sample = stream[first : first + SEQ_LENGTH + 1]
        with torch.no_grad():
            logits = model(input_ids=sample[None, :-1]).logits[0].double()
        total += float(torch.nn.functional.cross_entropy(logits, sample[1:], reduction="sum"))
    return total / (len(stream) - 1)


def test_every_stage_leaves_a_manifest(undisturbed, inputs):
    run_dir, finished = undisturbed
    assert stages_run(finished) == STAGES
    records = {stage: json.loads(text) for stage, (_, text) in manifests(run_dir).items()}
    assert sorted(records) == sorted(STAGES)
    for stage, record in records.items():
        assert record["stage"] == stage and record["status"] == "done"
        assert re.fullmatch("[0-9a-f]{64}", record["fingerprint"])
        assert record["times"]["seconds"] >= 0 and record["versions"]["torch"]
    assert records["distill"]["result"]["tokens"] == TOKENS
    assert records["distill"]["result"]["steps"] == NUM_STEPS
    assert records["distill"]["result"]["start_digest"] == records["prune"]["result"]["weights_digest"]
    assert {"tp": 1, "pp": 1, "dp": 1, "world_size": 1, "threads": 1}.items() <= records["score"]["world"].items()
    assert not list(run_dir.rglob("*.partial")) and not (run_dir / "round1" / "distill" / "resume").exists()


def test_summary_has_the_fields_of_the_contract(undisturbed, inputs):
    run_dir, _ = undisturbed
    found = summary(run_dir)
    (entry,) = found["rounds"]
    assert set(found) == {"name", "heldout_tokens", "heldout_bytes", "rounds"}
    assert set(entry) == {"name", "teacher", "pruned", "distilled", "controls", "recovery", "excess",
                          "excess_vs_scratch"}
    teacher, pruned, distilled = (entry[name] for name in ("teacher", "pruned", "distilled"))
    for model in (teacher, pruned, distilled):
        assert set(model) == MODEL_FIELDS
        assert math.isfinite(model["loss"])
    assert entry["name"] == "round1" and entry["controls"] == {} and entry["excess_vs_scratch"] is None
    assert (teacher["tokens"], pruned["tokens"], distilled["tokens"]) == (None, None, TOKENS)
    assert distilled["tokens_per_s"] == pytest.approx(TOKENS / distilled["seconds"], rel=0.01)
    assert entry["excess"] == pytest.approx(distilled["loss"] - teacher["loss"])
    assert entry["recovery"] == pytest.approx(
        (pruned["loss"] - distilled["loss"]) / (pruned["loss"] - teacher["loss"]))
    assert teacher["loss"] < distilled["loss"] < pruned["loss"], "distillation recovers, the teacher stays best"
    heldout = sorted(inputs.text.glob("*.txt"))[-4:]
    assert found["heldout_bytes"] == sum(file.stat().st_size for file in heldout)


def test_metrics_are_one_line_a_step(undisturbed):
    run_dir, _ = undisturbed
    lines = [json.loads(line) for line in (run_dir / "round1" / "distill" / "metrics.jsonl").read_text().splitlines()]
    heldout = [line for line in lines if "heldout_ce" in line]
    steps = [line for line in lines if "heldout_ce" not in line]
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert [line["step"] for line in heldout] == [20, 40]
    for line in steps:
        assert {"loss", "kl", "ce", "lr", "grad_norm", "seconds"} <= set(line)
        assert line["tokens"] == line["step"] * BATCH * SEQ_LENGTH
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [line["step"] for line in steps if "tokens_per_s" in line] == [10, 20, 30, 40]
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_the_report_needs_nothing_beside_it(undisturbed):
    page = (undisturbed[0] / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "<svg" in page
    outside = r"""(?:src|href)\s*=\s*["'](?!#|data:)|url\((?!["']?(?:#|data:))|@import|<link|<iframe"""
    assert not re.findall(outside, page)


def test_checkpoints_are_those_of_transformers(undisturbed, inputs):
    run_dir, _ = undisturbed
    found = summary(run_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs.teacher)
    stream = heldout_stream(inputs, tokenizer)
    assert found["heldout_tokens"] == len(stream) - 1
    for name, directory in {"teacher": inputs.teacher, "pruned": run_dir / "round1" / "prune" / "checkpoint",
                            "distilled": run_dir / "round1" / "distill" / "checkpoint"}.items():
        entry = found["rounds"][0][name]
        model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
        assert transformers.AutoTokenizer.from_pretrained(directory).get_vocab() == tokenizer.get_vocab()
        assert json.loads((directory / "config.json").read_text())["head_dim"] == 16
        arch = read_arch(directory)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        embeddings = model.get_input_embeddings().weight.numel() + model.get_output_embeddings().weight.numel()
        assert num_parameters == arch.num_parameters() == entry["num_parameters"]
        assert num_parameters - embeddings == entry["num_non_embedding_parameters"]
        assert reference_loss(model, stream) == pytest.approx(entry["loss"], abs=1e-3)
        assert model.generate(stream[None, :4], max_new_tokens=4, do_sample=False).shape == (1, 8)
    assert (arch.hidden_size, arch.ffn_hidden_size, arch.num_layers) == (24, 40, 4)


def test_the_same_command_again_does_nothing(undisturbed, inputs):
    run_dir, _ = undisturbed
    before = manifests(run_dir)
    again = run_well(inputs.arguments(run_dir.parent), run_dir.parent)
    assert again.seconds < 5 and stages_run(again) == []
    assert again.stdout.strip() == "already done: score, prune, distill, evaluate, report"
    assert manifests(run_dir) == before


def test_what_changes_runs_again_and_nothing_else(a_run, inputs, tmp_path):
    before = manifests(a_run)
    finished = run_well(inputs.arguments(a_run.parent, controls="[ce,scratch]"), tmp_path)
    assert stages_run(finished) == ["ce", "scratch", "evaluate", "report"]
    after = manifests(a_run)
    assert {stage: after[stage] for stage in ("score", "prune", "distill")} == {
        stage: before[stage] for stage in ("score", "prune", "distill")}
    (entry,) = summary(a_run)["rounds"]
    controls = entry["controls"]
    assert set(controls) == {"scratch", "ce"} and all(set(model) == MODEL_FIELDS for model in controls.values())
    assert all(model["tokens"] == TOKENS and math.isfinite(model["loss"]) for model in controls.values())
    assert controls["scratch"]["num_parameters"] == entry["distilled"]["num_parameters"]
    assert entry["excess_vs_scratch"] == pytest.approx(
        entry["excess"] / (controls["scratch"]["loss"] - entry["teacher"]["loss"]))

    finished = run_well(inputs.arguments(a_run.parent), tmp_path)
    assert stages_run(finished) == [] and manifests(a_run) == after
    assert summary(a_run)["rounds"] == [entry], "controls stay when a later command does not name them"

    finished = run_well(inputs.arguments(a_run.parent, prune__target__ffn_hidden_size=48), tmp_path)
    assert stages_run(finished) == ["prune", "distill", "evaluate", "report"]
    assert manifests(a_run)["score"] == before["score"]
    with TensorReader(a_run / "round1" / "distill" / "checkpoint") as reader:
        assert reader.shape("model.layers.0.mlp.gate_proj.weight") == (48, 24)
    (other,) = summary(a_run)["rounds"]
    arch = read_arch(a_run / "round1" / "distill" / "checkpoint")
    assert other["distilled"]["num_parameters"] == arch.num_parameters()
    assert other["controls"] == {} and other["excess_vs_scratch"] is None, "those of another target are no controls"
    assert other["teacher"] == entry["teacher"]


def test_random_weights_are_trained_until_they_are_as_good(a_run, inputs, tmp_path):
    """On half as many tokens again at most; the first look that is good enough is the last."""
    finished = run_well(inputs.arguments(a_run.parent, controls="[scratch_until]", scratch_until__max_ratio=1.5,
                                         train__eval_every_steps=15), tmp_path)
    assert stages_run(finished) == ["scratch_until", "evaluate", "report"]
    looks = {stage: [line["heldout_ce"] for line in map(json.loads, (
        a_run / "round1" / stage / "metrics.jsonl").read_text().splitlines()) if "heldout_ce" in line]
        for stage in ("distill", "scratch_until")}
    target, (*before, last) = looks["distill"][-1], looks["scratch_until"]
    (entry,) = summary(a_run)["rounds"]
    until = entry["controls"]["scratch_until"]
    assert until["tokens"] == until["token_ratio"] * TOKENS and until["reached"] == (last <= target)
    assert all(look > target for look in before)
    assert until["token_ratio"] in {15 / 40, 30 / 40, 45 / 40, 60 / 40} and until["reached"] | (
        until["token_ratio"] == 1.5)
