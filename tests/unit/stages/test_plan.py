"""`minitron plan`: a table, JSON, a refusal with a layout that fits, and nothing started or imported."""

import json
import subprocess
import sys

import pytest

from nemo_minitron.cli import main
from nemo_minitron.compose import load_config
from nemo_minitron.cost.plan import plan_of
from nemo_minitron.cost.propose import fastest, overrides, proposal
from nemo_minitron.errors import ArchError
from nemo_minitron.stages.plan import planned
from tests.support.checkpoints import UNTIED, write_llama

LARGE = ["experiment=nemotron4_minitron", "parallel=single"]
"""15B and 8B on one GPU: 145 GiB."""


def shown(capsys, *arguments):
    code = main(["plan", *arguments])
    return code, *capsys.readouterr()


def test_the_table_names_everything(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = shown(capsys, "experiment=nemotron4_minitron")
    assert (code, err) == (0, "")
    for words in ("128 x A100", "15,628,775,424", "6,174,547,968", "4.44e+17", "weights", "gradients", "optimizer",
                  "activations", "teacher", "loss", "GPU-hours at 40%", "1.80x", "40.4x", "Nemotron-3 8B"):
        assert words in out, words
    assert list(tmp_path.iterdir()) == [], "it starts and writes nothing"


def test_json_has_the_same(capsys):
    code, out, _ = shown(capsys, "format=json", "experiment=nemotron4_minitron", "plan.scaling=[128]")
    data = json.loads(out)
    assert code == 0 and data["fits"] and data["proposal"] is None
    assert data["models"][0]["num_parameters"] == 15_628_775_424
    assert [round_["search"]["num_candidates"] for round_ in data["rounds"]] == [15, 18]
    stages = data["stages"]
    assert [stage["stage"] for stage in stages] == ["score", "search", "distill"] * 2
    for stage in stages:
        memory = stage["memory"]
        assert memory["total"] == pytest.approx(sum(memory.values()) - memory["total"] - memory["stage"])
        assert stage["gpu_hours"] == pytest.approx(stage["seconds"] * 128 / 3600)
    assert data["total"]["flops"] == pytest.approx(sum(stage["flops"] for stage in stages))
    (row,) = data["scaling"]
    assert row["seconds"] <= data["total"]["seconds"], "the fastest layout is no slower than the recipe's"


def test_a_layout_that_does_not_fit_is_refused_with_one_that_does(capsys):
    code, out, err = shown(capsys, *LARGE)
    assert code == 2 and "memory of the fullest GPU" in out, "the plan is there to look at"
    assert len(err.splitlines()) == 1
    for words in ("does not fit", "74.5 GiB", "GiB in stage", "teacher 29.1", "optimizer", "parallel.tp="):
        assert words in err, words
    proposed = [word for word in err.split() if word.startswith(("parallel.", "train."))]
    code, _, _ = shown(capsys, *LARGE, *(word.rstrip(";)") for word in proposed if "=" in word))
    assert code == 0


def test_the_proposal_grows_until_it_fits():
    recipe = planned(load_config(LARGE))
    assert fastest(recipe, 1) is None
    found = proposal(recipe)
    assert found.fits and found.recipe.layout.world_size > 1
    assert fastest(recipe, found.recipe.layout.world_size // 2) is None
    again = planned(load_config([*LARGE, *overrides(found).split()]))
    assert plan_of(again).total("seconds") == found.total("seconds")


def test_a_teacher_on_disk_is_read_for_its_shape(tmp_path, capsys):
    write_llama(UNTIED, tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink(missing_ok=True)
    code, out, err = shown(capsys, f"teacher.path={tmp_path / 'teacher'}", "prune.target.ffn_hidden_size=20",
                           "data.seq_length=32")
    assert (code, err) == (0, "") and f"{UNTIED.num_parameters():,}" in out


def test_stages_decide_what_is_counted():
    def stages(*more):
        recipe = planned(load_config(["experiment=demo", *more]))
        return [(stage.stage, bool(stage.memory.teacher)) for stage in plan_of(recipe).stages]

    assert stages() == [("score", False), ("distill", True)]
    assert stages("controls=[ce,scratch]") == [("score", False), ("distill", True), ("ce", False), ("scratch", False)]
    cached = "stages=[prune,cache_teacher,distill]", "distill.cached=true", "distill.loss=top_k_kl"
    assert stages(*cached) == [("cache_teacher", False), ("distill", False)]
    assert stages("stages=[score,prune,distill,align]", "align.path=x") == [
        ("score", False), ("distill", True), ("align", False)]
    assert stages("stages=[score,prune,distill,align]", "align.model=teacher") == stages()
    recipe = planned(load_config(["experiment=demo_teacher"]))
    assert [stage.stage for stage in plan_of(recipe).stages] == ["correct"]


def test_every_training_of_an_alignment_has_a_row_of_its_own_size():
    recipe = planned(load_config(["experiment=demo_align"]))
    first, second = plan_of(recipe).stages[-2:]
    assert (first.stage, first.tokens, second.tokens) == ("align", 120_000, 24_000)
    assert first.steps == -(-120_000 // (8 * 256)) and second.steps == -(-24_000 // (8 * 256))


def test_a_search_costs_the_tokens_that_halving_spends(capsys):
    def searched(*more):
        recipe = planned(load_config(["experiment=demo_search", *more]))
        (stage,) = (stage for stage in plan_of(recipe).stages if stage.stage == "search")
        return stage

    whole, halved = searched(), searched("search.rungs=3")
    assert (whole.what, whole.steps, whole.tokens) == ("9 candidates", 9 * 40, 9 * 40 * 16 * 256)
    assert (halved.what, halved.steps) == ("9 candidates, 3 to the end", 9 * 10 + 5 * 10 + 3 * 20)
    assert halved.tokens == halved.steps * 16 * 256
    assert halved.flops == pytest.approx(whole.flops * halved.steps / whole.steps)
    assert halved.gpu_hours == pytest.approx(whole.gpu_hours * halved.steps / whole.steps)
    assert halved.memory == whole.memory
    code, out, _ = shown(capsys, "format=json", "experiment=demo_search", "search.rungs=3")
    search = json.loads(out)["rounds"][0]["search"]
    assert code == 0 and (search["num_candidates"], search["num_finalists"], search["steps"]) == (9, 3, 200)


def test_a_round_prunes_what_an_earlier_one_made():
    rounds = ("rounds=[{name: a, target: {hidden_size: 144}},"
              "{name: b, source: a, teacher: source, ratio: {ffn_hidden_size: 0.5}, distill: {tokens: 990000}}]")
    recipe = planned(load_config(["teacher.path=models/sympy-llama-2.8m", rounds]))
    first, second = recipe.rounds
    assert (second.student.arch.hidden_size, second.student.arch.ffn_hidden_size) == (144, 256)
    assert second.source == second.teacher == first.student and first.teacher == recipe.teacher
    assert (first.tokens, second.tokens) == (1_000_000, 990_000)


@pytest.mark.parametrize(("overrides", "named"), [
    (["experiment=demo", "format=xml"], "table, json"),
    (["experiment=demo", "plan.gpu=tpu"], "h100_sxm, a100_sxm"),
    (["experiment=demo", "parallel.tp=5"], "parallel.tp"),
    (["experiment=demo", "parallel.dp=3"], "train.global_batch_size"),
    (["experiment=demo", "optim.warmup_steps=100000"], "optim.warmup_steps"),
    (["experiment=demo", "prune.budget.num_parameters=1e9", "prune.target.hidden_size=null",
      "prune.target.ffn_hidden_size=null"], "a budget above the source"),
    (["experiment=demo", "search.hidden_size=[64]", "search.constraints.num_parameters.min=0.9"],
     "no architecture is left"),
    (["model.family=gpt2"], "model.family"),
    (["teacher.path=nowhere"], "nowhere"),
    ([], "prune.target"),
])
def test_one_line_names_the_mistake(overrides, named, capsys):
    code, out, err = shown(capsys, *overrides)
    assert (code, out) == (2, "") and named in err and len(err.splitlines()) == 1


def test_a_round_cannot_grow_its_source():
    rounds = "rounds=[{name: a, target: {hidden_size: 64}}, {name: b, source: a, target: {hidden_size: 128}}]"
    with pytest.raises(ArchError, match="does not fit its source"):
        planned(load_config(["teacher.path=models/sympy-llama-2.8m", rounds]))


def test_planning_imports_nothing_big():
    code = ("import sys, nemo_minitron.cli as cli; cli.main(['plan', 'experiment=demo'])\n"
            "print({'torch', 'megatron', 'nemo', 'lightning', 'transformers'} & set(sys.modules))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "set()"
