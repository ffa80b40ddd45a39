import importlib.util
from pathlib import Path

import pytest

from nemo_minitron.artifacts import Manifest
from nemo_minitron.compose import config_from_dict
from nemo_minitron.config import Config
from nemo_minitron.errors import ConfigError, UserError
from nemo_minitron.stages import registry
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.registry import STAGES, check_inputs, due_stages, is_current, wanted_stages
from tests.support.checkpoints import UNTIED, write_llama

DEFAULT = ["score", "prune", "distill", "evaluate", "report"]
WITH_CONTROLS = ["score", "prune", "distill", "ce", "scratch", "evaluate", "report"]

WITHOUT_EFFECT = {
    "importance.micro_batch_size": 2, "train.log_every_steps": 3, "train.eval_every_steps": 0, "train.eval_samples": 3,
    "train.checkpoint_every_steps": 7, "train.checkpoint_async": False, "parallel.tp": 2, "parallel.num_threads": 3,
    "evaluate.micro_batch_size": 1, "correct.tokens": 5, "teacher.licence": "other", "model.num_layers": 2,
}


@pytest.fixture
def context(tmp_path):
    write_llama(UNTIED, tmp_path / "teacher")
    config = Config(output_dir=str(tmp_path), controls=["ce", "scratch"])
    config.teacher.path = str(tmp_path / "teacher")
    config.prune.target.ffn_hidden_size = 20
    return Context(config=config)


def changed(context, key=None, value=None, **fields):
    """The context of another command: one dotted key, or whole fields, are different."""
    data = context.config.to_dict() | fields
    if key is not None:
        *nodes, name = key.split(".")
        place = data
        for node in nodes:
            place = place[node]
        place[name] = value
    return Context(config=config_from_dict(data))


def finish(context, *stages, digest="made"):
    """Write manifests as if `stages` had run; `digest` stands for what they made."""
    for stage in stages:
        inputs = registry.input_digests(context, stage)
        Manifest(stage=stage, fingerprint=registry.fingerprint(context, stage, inputs), inputs=inputs,
                 config=registry.stage_config(context, stage), versions={}, world={}, times={},
                 result={"weights_digest": f"{stage} {digest}"}).write(context.stage_dir(stage))
        for product in STAGES[stage].products:
            (context.config.run_dir / product).write_text("made")


def test_stages_name_functions_that_are_there_and_run_after_their_inputs():
    order = list(STAGES)
    for name, stage in STAGES.items():
        module, _, function = stage.function.partition(":")
        spec = importlib.util.find_spec(f"nemo_minitron.stages.{module}")
        assert spec is not None and f"def {function}(context: Context)" in Path(spec.origin).read_text()
        assert all(order.index(source) < order.index(name) for source in (*stage.inputs, *stage.optional_inputs)
                   if source in STAGES)
        assert set(stage.config) <= set(Config().to_dict())


def test_stages_run_in_the_order_of_the_table_whatever_the_recipe_says(context):
    assert wanted_stages(context) == WITH_CONTROLS
    mixed = changed(context, stages=["report", "prune", "score"], controls=[])
    assert wanted_stages(mixed) == ["score", "prune", "report"]


def test_everything_is_due_at_first_and_nothing_once_done(context):
    assert due_stages(context) == WITH_CONTROLS
    finish(context, *WITH_CONTROLS)
    assert due_stages(context) == []


def test_an_interrupted_run_goes_on_where_it_was(context):
    finish(context, "score", "prune")
    assert due_stages(context) == ["distill", "ce", "scratch", "evaluate", "report"]


@pytest.mark.parametrize(("missing", "due"), [
    ("score", WITH_CONTROLS), ("prune", WITH_CONTROLS[1:]), ("distill", ["distill", "evaluate", "report"]),
    ("scratch", ["scratch", "evaluate", "report"]), ("evaluate", ["evaluate", "report"]), ("report", ["report"]),
])
def test_what_reads_a_missing_result_is_due_with_it(missing, due, context):
    finish(context, *WITH_CONTROLS)
    (context.stage_dir(missing) / "manifest.json").unlink()
    assert due_stages(context) == due


@pytest.mark.parametrize(("key", "value", "due"), [
    ("seed", 5, WITH_CONTROLS),
    ("data.seq_length", 32, WITH_CONTROLS),
    ("importance.num_samples", 7, WITH_CONTROLS),
    ("importance.batch", "mean", WITH_CONTROLS[1:]),
    ("prune.target.ffn_hidden_size", 10, WITH_CONTROLS[1:]),
    ("optim.lr", 0.5, WITH_CONTROLS[2:]),
    ("train.global_batch_size", 16, WITH_CONTROLS[2:]),
    ("distill.tokens", 512, WITH_CONTROLS[2:]),
    ("distill.kd_weight", 0.5, ["distill", "evaluate", "report"]),
    ("distill.intermediate.alpha", 0.5, ["distill", "evaluate", "report"]),
    ("distill.teacher.precision", "bf16", ["distill", "evaluate", "report"]),
    ("distill.teacher.tp", 1, []),
    ("distill.teacher.offload_states", True, []),
    ("train.profile.first_step", 3, []),
    ("train.recompute", "full", []),
    ("train.keep_best", True, WITH_CONTROLS[2:]),
    ("train.last_batch", "partial", WITH_CONTROLS[2:]),
    *[(key, value, []) for key, value in WITHOUT_EFFECT.items()],
])
def test_a_change_makes_due_what_depends_on_it(key, value, due, context):
    finish(context, *WITH_CONTROLS)
    assert due_stages(changed(context, key, value)) == due


def test_another_teacher_makes_everything_due(context):
    finish(context, *WITH_CONTROLS)
    write_llama(UNTIED, Path(context.config.teacher.path), seed=1)
    assert due_stages(context) == WITH_CONTROLS


def test_a_copy_of_the_teacher_is_the_same_teacher(context, tmp_path):
    finish(context, *WITH_CONTROLS)
    write_llama(UNTIED, tmp_path / "copy")
    assert due_stages(changed(context, "teacher.path", str(tmp_path / "copy"))) == []


def test_a_stage_made_anew_with_another_result_makes_its_readers_due(context):
    finish(context, *WITH_CONTROLS)
    finish(context, "prune", digest="made otherwise")
    assert due_stages(context) == WITH_CONTROLS[2:]


def test_controls_are_asked_for_and_stay(context):
    plain = changed(context, controls=[])
    finish(plain, *DEFAULT)
    assert due_stages(plain) == []
    assert due_stages(context) == ["ce", "scratch", "evaluate", "report"]
    finish(context, "ce", "scratch", "evaluate", "report")
    assert due_stages(plain) == [] and is_current(plain, "ce")


def test_controls_of_another_target_do_not_count(context):
    finish(context, *WITH_CONTROLS)
    smaller = changed(context, "prune.target.ffn_hidden_size", 10, controls=[])
    assert due_stages(smaller) == ["prune", "distill", "evaluate", "report"]
    finish(smaller, "prune", "distill", digest="made smaller")
    assert is_current(smaller, "distill") and not is_current(smaller, "ce")
    assert {"prune", "distill", "teacher"} == set(registry.input_digests(smaller, "evaluate"))


def test_what_is_made_from_something_stale_is_stale(context):
    finish(context, *WITH_CONTROLS)
    assert not is_current(changed(context, "prune.target.ffn_hidden_size", 10), "distill")


def test_a_teacher_of_the_recipe_own_making(context):
    made = changed(context, "teacher.path", None, stages=["initialize", "correct", *DEFAULT], controls=[])
    assert due_stages(made) == ["initialize", "correct", *DEFAULT]
    finish(made, "initialize", "correct", *DEFAULT)
    assert due_stages(made) == []
    assert due_stages(changed(made, "correct.tokens", 5)) == ["correct", *DEFAULT]
    assert due_stages(changed(made, "model.num_layers", 2)) == ["initialize", "correct", *DEFAULT]


@pytest.mark.parametrize(("stages", "named"), [(["prune"], "score"), (["score", "distill"], "prune"),
                                               (["report"], "evaluate")])
def test_a_stage_without_its_input_is_refused(stages, named, context):
    partial = changed(context, stages=stages, controls=[])
    with pytest.raises(ConfigError, match=f"expected {named} among the stages.*change stages"):
        check_inputs(partial, due_stages(partial))


def test_inputs_may_be_there_from_an_earlier_run(context):
    finish(context, "score")
    partial = changed(context, stages=["prune"], controls=[])
    check_inputs(partial, due_stages(partial))


@pytest.mark.parametrize("text", ["", "[]", '{"stage": "score"}'])
def test_a_manifest_that_is_none_is_named(text, context):
    finish(context, "score")
    path = context.stage_dir("score") / "manifest.json"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        due_stages(context)


def test_a_report_that_was_deleted_is_due_again(context):
    finish(context, *WITH_CONTROLS)
    (context.config.run_dir / "report.html").unlink()
    assert due_stages(context) == ["report"]


def test_a_stage_alone_is_refused_where_its_input_belongs_to_another_recipe(context):
    finish(context, *WITH_CONTROLS)
    alone = changed(changed(context, "prune.target.ffn_hidden_size", 16), stages=["distill"], controls=[])
    with pytest.raises(ConfigError, match="prune among the stages"):
        registry.check_inputs(alone, due_stages(alone))


def test_text_is_known_by_content_not_by_place(context, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("some text")
    here, there = (changed(context, "data.path", str(tmp_path / name)) for name in ("here", "there"))
    finish(here, *WITH_CONTROLS)
    assert due_stages(there) == []
    (tmp_path / "there" / "a.txt").write_text("other text")
    assert "score" in due_stages(there)


@pytest.fixture
def aligned(context, tmp_path):
    """The recipe with the teacher's answers and an alignment on them and on a file; all of it has run."""
    for name, text in (("prompts", '{"prompt": "a"}'), ("chat", "{}"), ("template", "{{ messages }}")):
        (tmp_path / name).write_text(text)
    phases = [{"name": "chat", "path": str(tmp_path / "chat")}, {"name": "sdg", "source": "generate"}]
    found = changed(context, stages=[*DEFAULT, "generate", "align"], controls=[])
    data = found.config.to_dict()
    data["generate"]["prompts"] = str(tmp_path / "prompts")
    data["align"] |= {"phases": phases, "chat_template": str(tmp_path / "template")}
    found = Context(config=config_from_dict(data))
    finish(found, *wanted_stages(found))
    return found


TUNED = ["align", "evaluate", "report"]


def test_an_alignment_runs_after_what_it_reads(aligned):
    assert wanted_stages(aligned) == ["score", "prune", "generate", "distill", *TUNED]
    assert set(registry.input_digests(aligned, "align")) == {"distill", "generate"}
    assert due_stages(aligned) == []


@pytest.mark.parametrize(("key", "value", "due"), [
    ("align.tokens", 5, TUNED), ("align.lr", 0.5, TUNED), ("align.packing", "none", TUNED),
    ("align.heldout_fraction", 0.5, TUNED), ("align.seq_length", 16, TUNED), ("align.model", "pruned", TUNED),
    ("align.source", "generate", []), ("align.path", "/elsewhere", []),
    ("generate.max_new_tokens", 5, ["generate", *TUNED]), ("distill.kd_weight", 0.5, ["distill", *TUNED]),
])
def test_a_change_makes_the_alignment_due_where_it_depends_on_it(key, value, due, aligned):
    """Its own source and path say nothing where it has phases."""
    assert due_stages(changed(aligned, key, value)) == due


@pytest.mark.parametrize(("name", "due"), [("chat", TUNED), ("template", TUNED), ("prompts", ["generate", *TUNED])])
def test_conversations_and_template_are_known_by_content(name, due, aligned, tmp_path):
    (tmp_path / name).write_text('{"prompt": "another"}')
    assert due_stages(aligned) == due


def test_a_learning_rate_that_the_alignment_has_of_its_own(aligned):
    own = changed(aligned, "align.lr", 0.25)
    finish(own, *wanted_stages(own))
    assert due_stages(own) == []
    other = changed(own, "optim.lr", 0.5)
    assert registry.stage_config(other, "align") == registry.stage_config(own, "align")


def test_an_alignment_without_the_teachers_answers_is_refused(aligned):
    alone = changed(aligned, stages=[*DEFAULT, "align"], name="new")
    with pytest.raises(ConfigError, match=r"align lacks.*expected generate among the stages.*change stages"):
        check_inputs(alone, due_stages(alone))


def test_a_model_from_elsewhere_is_known_by_content(aligned, tmp_path):
    write_llama(UNTIED, tmp_path / "other", seed=4)
    other = changed(aligned, "align.model", str(tmp_path / "other"))
    finish(other, *wanted_stages(other))
    assert due_stages(other) == [] and due_stages(changed(other, "distill.kd_weight", 0.5)) == ["distill", *TUNED[1:]]
    write_llama(UNTIED, tmp_path / "other", seed=5)
    assert due_stages(other) == TUNED
