from pathlib import Path

import pytest

from nemo_minitron import pipeline
from nemo_minitron.artifacts import Manifest
from nemo_minitron.compose import config_from_dict
from nemo_minitron.errors import UserError
from nemo_minitron.stages import registry
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.registry import due_stages, wanted_stages
from nemo_minitron.stages.rounds import candidate_context, compared_context, round_context, round_contexts
from tests.support.checkpoints import UNTIED, write_llama

HALF = {"name": "half", "target": {"ffn_hidden_size": 20}}
QUARTER = {"name": "quarter", "source": "half", "target": {"hidden_size": 16}, "distill": {"tokens": 640, "lr": 0.5}}
SEARCH = {"ffn_hidden_size": [20, 16], "divisors": {"ffn_hidden_size": 4}, "tokens": 512, "looks": 2}
SIZES = {"num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 20, "num_attention_heads": 4, "num_query_groups": 2}


@pytest.fixture
def recipe(tmp_path):
    write_llama(UNTIED, tmp_path / "teacher")

    def make(**changes):
        base = {"output_dir": str(tmp_path), "teacher": {"path": str(tmp_path / "teacher")}, "data": {"seq_length": 32},
                "train": {"global_batch_size": 8, "micro_batch_size": 2}, "optim": {"warmup_steps": 1},
                "distill": {"tokens": 2560}}
        return Context(config=config_from_dict(base | changes))

    return make


def test_a_recipe_without_rounds_is_one_round(recipe):
    context = recipe(prune={"target": {"ffn_hidden_size": 20}})
    assert round_contexts(context) == [context]
    assert round_context(context, "round1") is context


def test_rounds_have_their_own_source_target_and_settings(recipe):
    half, quarter = round_contexts(recipe(rounds=[HALF, QUARTER], stages=["correct", "score", "prune", "distill"]))
    assert (half.round_dir.name, quarter.round_dir.name) == ("half", "quarter")
    assert half.source_path() == half.stage_dir("correct") / "checkpoint" == quarter.teacher_path()
    assert quarter.source_path() == half.stage_dir("distill") / "checkpoint"
    assert (half.config.distill.tokens, quarter.config.distill.tokens) == (2560, 640)
    assert (half.config.optim.lr, quarter.config.optim.lr) == (0.002, 0.5)
    assert quarter.config.correct.optim(quarter.config.optim).lr == 0.002, "the round's rate is not the correction's"
    assert (half.config.prune.target.ffn_hidden_size, quarter.config.prune.target.hidden_size) == (20, 16)
    assert (wanted_stages(half)[0], wanted_stages(quarter)[0]) == ("correct", "score")


def test_the_nearest_teacher(recipe):
    half, quarter = round_contexts(recipe(rounds=[HALF, QUARTER | {"teacher": "source"}]))
    assert quarter.teacher_path() == quarter.source_path() == half.stage_dir("distill") / "checkpoint"


def test_a_later_round_is_due_when_its_source_is_made_anew(recipe):
    contexts = round_contexts(recipe(rounds=[HALF, QUARTER], stages=["score", "prune", "distill"]))

    def finish(context, digest):
        for stage in wanted_stages(context):
            inputs = registry.input_digests(context, stage)
            Manifest(stage=stage, fingerprint=registry.fingerprint(context, stage, inputs), inputs=inputs, config={},
                     versions={}, world={}, times={},
                     result={"weights_digest": f"{stage} {digest}"}).write(context.stage_dir(stage))

    half, quarter = contexts
    assert due_stages(quarter) == ["score", "prune", "distill"]
    finish(half, "first")
    finish(quarter, "first")
    assert due_stages(half) == due_stages(quarter) == []
    finish(half, "second")
    assert due_stages(half) == [] and due_stages(quarter) == ["score", "prune", "distill"]


def test_a_candidate_shares_the_scores_and_has_its_own_folder(recipe):
    context = recipe(search=SEARCH, train={"global_batch_size": 8, "micro_batch_size": 2, "keep_best": True})
    found = candidate_context(context, "small", SIZES)
    assert found.stage_dir("score") == context.stage_dir("score")
    assert found.stage_dir("distill") == Path(context.round_dir) / "search" / "small" / "distill"
    assert wanted_stages(found) == ["prune", "distill"]
    assert (found.config.distill.tokens, found.config.train.eval_every_steps) == (512, 1)
    assert not found.config.train.keep_best and not found.config.search.is_set()
    assert wanted_stages(compared_context(context, SIZES)) == ["prune", "distill", "evaluate"]
    assert wanted_stages(context) == ["score", "search", "prune", "distill", "evaluate", "report"]


def test_a_search_does_not_depend_on_the_long_distillation(recipe):
    context, longer, other = (recipe(search=SEARCH | more, distill={"tokens": tokens})
                              for more, tokens in (({}, 2560), ({"compare": True}, 5120), ({"looks": 1}, 2560)))
    parts = [registry.stage_config(one, "search") for one in (context, longer, other)]
    assert parts[0] == parts[1] != parts[2]


@pytest.mark.parametrize(("changes", "candidate", "search"), [
    ({"search": SEARCH | {"looks": 1}}, True, True),
    ({"train": {"eval_samples": 3}}, True, True),
    ({"search": SEARCH | {"rungs": 2}}, False, True),
    ({"search": SEARCH | {"compare": True}}, False, False),
    ({"train": {"eval_every_steps": 7}}, False, False),
    ({"train": {"log_every_steps": 7}}, False, False),
])
def test_what_a_candidate_s_curve_depends_on(changes, candidate, search, recipe):
    base = {"search": SEARCH, "train": {"global_batch_size": 8, "micro_batch_size": 2}}
    before, after = (recipe(**base | {key: base[key] | value for key, value in more.items()})
                     for more in ({}, changes))
    curves = [registry.stage_config(candidate_context(one, "small", SIZES), "distill") for one in (before, after)]
    assert (curves[0] != curves[1]) is candidate
    assert (registry.stage_config(before, "search") != registry.stage_config(after, "search")) is search
    compared = [registry.stage_config(compared_context(one, SIZES), "distill") for one in (before, after)]
    assert compared[0] == compared[1], "the full distillation does not depend on how the search looks"


@pytest.mark.parametrize(("changes", "message"), [
    ({"rounds": [HALF, QUARTER | {"target": {"ffn_hidden_size": 32}}]}, "ffn_hidden_size"),
    ({"rounds": [HALF, QUARTER | {"distill": {"warmup_steps": 99}}]}, "warm-up"),
    ({"rounds": [HALF, QUARTER], "distill": {"tokens": 2560, "intermediate": {"terms": [{"state": "hidden"}]}}},
     "rounds"),
    ({"search": SEARCH | {"tokens": 0}}, "bad search"),
    ({"search": SEARCH | {"keep": 0.0}}, "bad search"),
    ({"search": SEARCH, "importance": {"iterations": 2}}, "importance.iterations"),
    ({"search": SEARCH, "prune": {"target": {"ffn_hidden_size": 20}}}, "search and prune"),
    ({"search": SEARCH | {"warmup_steps": 2}}, "warm-up"),
    ({"search": SEARCH | {"constraints": {"num_parameters": {"min": 1.0}}}}, "rules out"),
    ({"search": SEARCH | {"constraints": {"num_parameters": {"max": 1e9}}}}, "above the source"),
])
def test_mistakes_are_found_before_anything_starts(changes, message, recipe):
    with pytest.raises(UserError, match=message):
        pipeline.check_recipe(recipe(**changes))


def test_recipes_that_fit(recipe):
    pipeline.check_recipe(recipe(rounds=[HALF, QUARTER]))
    pipeline.check_recipe(recipe(search=SEARCH))
    pipeline.check_recipe(recipe(rounds=[{"name": "half", "search": SEARCH}, QUARTER]))
