"""Recipes that use what importance and pruning can do, through the command."""

import json

import pytest

from nemo_minitron.artifacts import Plan
from nemo_minitron.checkpoint.families import read_arch
from nemo_minitron.importance.scores import Scores
from tests.e2e.command import run, run_well


def plan_of(run_dir):
    return Plan.from_dict(json.loads((run_dir / "round1" / "prune" / "plan.json").read_text()))


def test_all_axes_by_depth_metrics_and_on_a_budget(inputs, tmp_path):
    questions = [{"context": "the cat", "continuation": [" sat", " flew"], "answer": 0}]
    (tmp_path / "task.json").write_text(json.dumps(questions))
    run_well(inputs.arguments(
        tmp_path / "outputs", stages="[score,prune]", prune__target__hidden_size=None,
        prune__target__ffn_hidden_size=None, prune__divisors__hidden_size=4, prune__divisors__ffn_hidden_size=4,
        prune__budget__num_non_embedding_parameters=0.5, prune__target__num_attention_heads=2,
        importance__depth__metrics="[loss,logit_mse,accuracy]", importance__depth__block_lengths="[1,2]",
        importance__depth__iterative=True, importance__depth__task=tmp_path / "task.json",
        importance__depth__num_samples=4, prune__ratio__num_layers=0.5, prune__layers__by="loss",
        prune__layers__contiguous=True, prune__head_residual=0.5), tmp_path)
    run_dir = tmp_path / "outputs" / "tiny"
    scores, plan = Scores.load(run_dir / "round1" / "score"), plan_of(run_dir)
    kept = read_arch(run_dir / "round1" / "prune" / "checkpoint")
    assert kept == plan.target
    assert kept.num_non_embedding_parameters() <= 0.5 * plan.source.num_non_embedding_parameters()
    assert (kept.num_layers, kept.num_attention_heads, kept.num_query_groups) == (2, 2, 2)
    start = int(scores.tensors["layers.loss.2"].argmin())
    assert set(range(4)) - set(plan.layers) == {start, start + 1}
    assert plan.head_pairs and plan.head_residual == 0.5
    assert {"layers.accuracy.1", "layers.logit_mse.2", "layers.logit_mse.removal_order"} <= scores.tensors.keys()


def test_importance_in_steps_is_the_same_on_two_ranks(inputs, tmp_path):
    plans = []
    for tp in (1, 2):
        run_well(inputs.arguments(tmp_path / str(tp), stages="[score,prune]", importance__iterations=2,
                                  prune__divisors__hidden_size=4, prune__divisors__ffn_hidden_size=4,
                                  parallel__tp=tp), tmp_path)
        plans.append(plan_of(tmp_path / str(tp) / "tiny"))
        assert not (tmp_path / str(tp) / "tiny" / "round1" / "score" / "steps").exists()
    assert dataclasses_without_digest(plans[0]) == dataclasses_without_digest(plans[1])


def dataclasses_without_digest(plan):
    return {name: value for name, value in plan.to_dict().items() if name != "scores_digest"}


@pytest.mark.parametrize("changes", [{"batch": "mean"}, {"norms": "[final]"}, {"ranking": "summed"}])
def test_another_ranking_needs_no_scoring_nor_does_another_run(undisturbed, inputs, tmp_path, changes):
    """The scores of a finished run of another name, ranked otherwise, without the stage `score`."""
    run_dir, _ = undisturbed
    finished = run_well(inputs.arguments(
        tmp_path / "outputs", stages="[score,prune]", prune__scores=run_dir / "round1" / "score",
        **{f"importance__{key}": value for key, value in changes.items()}), tmp_path)
    assert [line for line in finished.stdout.splitlines() if line.startswith("==")] == ["== prune"]
    before, after = plan_of(run_dir), plan_of(tmp_path / "outputs" / "tiny")
    assert before.target == after.target and before.scores_digest == after.scores_digest
    assert (before.hidden, before.ffn) != (after.hidden, after.ffn)


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_baselines_need_no_text(inputs, tmp_path, method):
    finished = run_well(inputs.arguments(tmp_path / "outputs", stages="[score,prune]", importance__method=method),
                        tmp_path)
    assert f"[score] {method}" in finished.stdout
    assert not (tmp_path / "outputs" / "data").exists()
    assert plan_of(tmp_path / "outputs" / "tiny").target.hidden_size == 24


def test_a_blend_is_the_same_on_two_replicas(inputs, tmp_path):
    """JSON lines and text by weight, from scores to the report; the layout changes no loss."""
    lines = [path.read_text() for path in sorted(inputs.text.rglob("*")) if path.is_file()]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"body": text[::-1]}) + "\n" for text in lines * 4))
    blend = f"[{{name: a, path: {inputs.text}, weight: 3}}, {{name: b, path: {tmp_path / 'more.jsonl'}, weight: 1}}]"
    losses = []
    for dp in (1, 2):
        run_well(inputs.arguments(tmp_path / str(dp), data__path=None, data__blend=blend, data__json_key="body",
                                  distill__tokens=1280, parallel__dp=dp), tmp_path)
        summary = json.loads((tmp_path / str(dp) / "tiny" / "summary.json").read_text())
        losses.append([summary["rounds"][0][name]["loss"] for name in ("teacher", "pruned", "distilled")])
        manifest = json.loads((tmp_path / str(dp) / "tiny" / "round1" / "score" / "manifest.json").read_text())
        assert [source["name"] for source in manifest["config"]["data"]["blend"]] == ["a", "b"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(("changes", "key"), [
    ({"data__blend": "[{name: a, path: x}]"}, "data.blend"),
    ({"data__path": None, "data__blend": "[{name: a, path: x}, {name: a, path: y}]"}, "data.blend"),
    ({"data__path": None, "data__blend": "[{name: a, path: x, weight: 0}]"}, "data.blend"),
    ({"data__path": None, "data__blend": "[{path: x}]"}, "name"),
    ({"distill__loss": "mse", "distill__temperature": 2}, "distill.temperature"),
    ({"distill__loss": "hinge"}, "distill.loss"), ({"distill__temperature": 0}, "distill.temperature"),
    ({"distill__loss": "top_k_kl", "distill__top_k": 100000}, "distill.top_k"),
])
def test_mistakes_in_blends_and_losses_are_one_line_before_anything_runs(inputs, tmp_path, changes, key):
    finished = run(inputs.arguments(tmp_path / "outputs", **changes), tmp_path)
    assert finished.code == 2, finished
    (line,) = finished.stderr.splitlines()
    assert key in line
    assert not list(tmp_path.rglob("manifest.json"))
