import fcntl
import json
import os
import types

import pytest
import yaml

from nemo_minitron import pipeline
from nemo_minitron.compose import config_from_dict
from nemo_minitron.errors import ArchError, CheckpointError, ConfigError, LayoutError, UserError
from nemo_minitron.launch import locks
from nemo_minitron.stages.context import Context
from tests.support.checkpoints import UNTIED, write_llama


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    write_llama(UNTIED, directory)
    return directory


@pytest.fixture
def recipe(teacher, tmp_path):
    """`recipe(parallel={"tp": 2})`: a recipe that fits the teacher, with nodes changed."""
    def make(**changes):
        base = {"output_dir": str(tmp_path), "teacher": {"path": str(teacher)}, "data": {"seq_length": 32},
                "prune": {"target": {"ffn_hidden_size": 20}}, "train": {"global_batch_size": 8, "micro_batch_size": 2}}
        lists = {key: value for key, value in changes.items() if isinstance(value, list)}
        nodes = {node: base.get(node, {}) | values for node, values in changes.items() if node not in lists}
        return config_from_dict(base | nodes | lists)

    return make


@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"tp": 4, "pp": 4}, {"tp": 2, "pp": 2, "dp": 2}, {"dp": 4},
                                      {"pp": 3}])
def test_a_recipe_that_fits(parallel, recipe):
    pipeline.check_recipe(Context(config=recipe(parallel=parallel)))


def test_an_fp8_teacher_needs_transformer_engine(recipe, monkeypatch):
    context = Context(config=recipe(distill={"teacher": {"precision": "fp8"}}))
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Transformer Engine.*distill.teacher.precision"):
        pipeline.check_recipe(context)
    monkeypatch.setattr(pipeline, "find_spec", lambda name: "found")
    pipeline.check_recipe(context)


@pytest.mark.parametrize(("changes", "error", "key"), [
    ({"parallel": {"tp": 3}}, LayoutError, "parallel.tp"),
    ({"parallel": {"tp": 4}, "prune": {"target": {"ffn_hidden_size": 18}}}, LayoutError, "target.*parallel.tp"),
    ({"parallel": {"pp": 5}}, LayoutError, "teacher.*parallel.pp"),
    ({"parallel": {"pp": 3}, "prune": {"target": {"num_layers": 2}}}, LayoutError, "target.*parallel.pp"),
    ({"parallel": {"dp": 3}}, ConfigError, "train.global_batch_size"),
    ({"stages": ["correct", "score", "prune"], "prune": {"target": {"hidden_size": 999}}}, ArchError, "hidden_size"),
    ({"stages": ["initialize", "correct", "score", "prune"], "parallel": {"tp": 5}}, LayoutError, "parallel.tp"),
    ({"optim": {"warmup_steps": 10**9}}, ConfigError, "optim.warmup_steps"),
    ({"parallel": {"tp": 2, "sequence_parallel": True}, "data": {"seq_length": 33}}, LayoutError, "data.seq_length"),
    ({"data": {"seq_length": 65}}, ConfigError, "data.seq_length"),
    ({"prune": {"target": {}}}, ConfigError, "prune.target"),
    ({"prune": {"target": {"hidden_size": 25}}}, ArchError, "prune.target.hidden_size"),
    ({"parallel": {"cp": 2}}, ConfigError, "context parallelism.*parallel.cp"),
    ({"parallel": {"interleave": 2}}, ConfigError, "interleaved.*parallel.interleave"),
    ({"parallel": {"tp": 2}, "distill": {"teacher": {"tp": 3}}}, LayoutError, "divides the 2.*distill.teacher.tp"),
    ({"parallel": {"pp": 8, "dp": 1}, "distill": {"teacher": {"pp": 1}}}, LayoutError, "parallel.pp"),
    ({"distill": {"teacher": {"precision": "fp4"}}}, ConfigError, "distill.teacher.precision"),
    ({"distill": {"intermediate": {"terms": [{"state": "hidden", "layers": "last-2:9"}]}}}, ConfigError,
     "beyond the student.*distill.intermediate.terms"),
    ({"distill": {"intermediate": {"terms": [{"state": "hidden", "layers": "4:last"}]}}}, ConfigError,
     "beyond the teacher.*distill.intermediate.terms"),
    ({"distill": {"intermediate": {"terms": [{"state": "embedding"}, {"state": "embedding"}]}}}, ConfigError, "twice"),
    ({"distill": {"intermediate": {"terms": [{"state": "attention", "layers": "0:0"}], "relation_heads": 7}}},
     ConfigError, "distill.intermediate.relation_heads"),
    ({"distill": {"intermediate": {"alpha": -1.0}}}, ConfigError, "distill.intermediate.alpha"),
    ({"distill": {"intermediate": {"terms": [{"state": "embedding"}]}}, "train": {"recompute": "full"}}, ConfigError,
     "train.recompute"),
    ({"distill": {"phases": [{"tokens": 9999}, {"tokens": 9999, "global_batch_size": 3}]}}, ConfigError,
     "batch sizes do not divide.*distill.phases"),
    ({"distill": {"phases": [{"tokens": 99999, "seq_length": 65}]}}, ConfigError, "context.*distill.phases"),
    ({"distill": {"phases": [{"tokens": 0}]}}, ConfigError, "distill.phases"),
    ({"distill": {"phases": [{"tokens": 9999}], "cached": True, "loss": "top_k_kl"}}, ConfigError, "distill.cached"),
    ({"train": {"keep_best": True, "eval_every_steps": 0}}, ConfigError, "train.keep_best"),
    ({"train": {"stop": {"heldout_ce": 2.0}, "eval_every_steps": 0}}, ConfigError, "train.stop.heldout_ce"),
    ({"train": {"eval_every_steps": 0}, "controls": ["scratch_until"]}, ConfigError, "controls"),
    ({"scratch_until": {"max_ratio": 0.0}}, ConfigError, "scratch_until.max_ratio"),
    ({"train": {"stop": {"steps": 0}}}, ConfigError, "train.stop.steps"),
    ({"train": {"recompute": "some"}}, ConfigError, "train.recompute"),
    ({"report": {"beside": ["nowhere"]}}, ConfigError, "finished run.*nowhere.*report.beside"),
    ({"prune": {"student": "nowhere"}}, CheckpointError, "nowhere"),
    ({"teacher": {"path": None}}, ConfigError, "teacher.path"),
    ({"teacher": {"path": "nowhere"}}, CheckpointError, "nowhere"),
])
def test_a_recipe_that_does_not_fit(changes, error, key, recipe):
    with pytest.raises(error, match=key):
        pipeline.check_recipe(Context(config=recipe(**changes)))


def test_a_correction_has_a_warm_up_of_its_own(recipe):
    pipeline.check_recipe(Context(config=recipe(stages=["correct"], optim={"warmup_steps": 10**9},
                                                correct={"warmup_steps": 3})))
    with pytest.raises(ConfigError, match="warm-up"):
        pipeline.check_recipe(Context(config=recipe(stages=["correct"], correct={"warmup_steps": 10**9})))


def test_a_teacher_that_is_yet_to_be_made_is_not_looked_for(recipe):
    config = recipe(teacher={"path": None})
    config.stages = ["initialize", "correct", "score", "prune"]
    pipeline.check_recipe(Context(config=config))


def test_the_record_of_a_run(recipe):
    config = recipe()
    config.run_dir.mkdir(parents=True)
    pipeline._record(config, ["experiment=demo"])
    pipeline._record(config, ["experiment=demo", "controls=[ce]"])
    assert config_from_dict(yaml.safe_load((config.run_dir / "config.yaml").read_text())) == config
    commands = json.loads((config.run_dir / "commands.json").read_text())
    assert [entry["command"] for entry in commands] == [["minitron", "experiment=demo"],
                                                        ["minitron", "experiment=demo", "controls=[ce]"]]


def test_a_second_run_of_the_name_is_kept_out(tmp_path, monkeypatch):
    clock = [0.0]
    fake = types.SimpleNamespace(monotonic=lambda: clock[0],
                                 sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(locks, "time", fake)
    with pipeline._lock(tmp_path), pytest.raises(UserError, match=r"in progress.*name"), pipeline._lock(tmp_path):
        pass
    assert 55 < clock[0] < 65, "it waits for the workers of a killed run"
    with pipeline._lock(tmp_path):
        pass


def test_who_inherits_the_lock_holds_it(tmp_path):
    with pipeline._lock(tmp_path) as lock:
        inherited = os.dup(lock)
    with open(tmp_path / ".lock") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(inherited)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_candidates_of_an_array_share_the_run_and_keep_an_ordinary_one_out(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(locks, "time", types.SimpleNamespace(
        monotonic=lambda: clock[0], sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds)))
    together = pipeline._lock(tmp_path, shared=True), pipeline._lock(tmp_path, shared=True)
    with together[0], together[1], pytest.raises(UserError, match="in progress"), pipeline._lock(tmp_path):
        pass
    with pipeline._lock(tmp_path), pytest.raises(UserError, match="in progress"), pipeline._lock(tmp_path, shared=True):
        pass


SEARCH = ["prune.target.ffn_hidden_size=null", "search.ffn_hidden_size=[20,16]", "search.divisors.ffn_hidden_size=4",
          "search.tokens=512", "search.looks=2", "optim.warmup_steps=1"]


@pytest.mark.parametrize(("arguments", "error", "words"), [
    ([], ConfigError, "which candidate.*rung="), (["rung=1"], ConfigError, "SLURM_ARRAY_TASK_ID"),
    (["rung=one", "task=0"], ConfigError, "rung=one"), (["rung=1", "task=-1"], ConfigError, "task=-1"),
    (["rung=1", "task=0", "search.tokens=0"], ConfigError, "search"),
    (["rung=1", "task=0", *SEARCH], ConfigError, "stage search lacks its input.*score"),
])
def test_a_task_that_has_no_candidate(arguments, error, words, teacher, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    recipe = [f"teacher.path={teacher}", f"output_dir={tmp_path}", "data.seq_length=32", "train.global_batch_size=8",
              "train.micro_batch_size=2", "prune.target.ffn_hidden_size=20"]
    with pytest.raises(error, match=words):
        pipeline.candidate([*recipe, *arguments])
    assert not list(tmp_path.glob("run/round1/search/*")), "nothing has begun"


def test_groups_of_a_search_are_whole_replicas(recipe):
    pipeline.check_recipe(Context(config=recipe(parallel={"dp": 4, "search_groups": 2})))
    with pytest.raises(ConfigError, match=r"divisor of parallel.dp.*parallel.search_groups"):
        recipe(parallel={"dp": 4, "search_groups": 3})
