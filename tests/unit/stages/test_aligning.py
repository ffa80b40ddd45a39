import json
from pathlib import Path

import pytest

from nemo_minitron.compose import config_from_dict, load_config
from nemo_minitron.config import Config
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.stages.aligning import (
    align_inputs,
    align_phases,
    check_align,
    keys_of_align,
    phase_context,
    start_path,
    take_answers,
)
from nemo_minitron.stages.context import Context
from tests.support.chats import conversations, write_conversations
from tests.support.checkpoints import UNTIED, write_llama


def recipe(stages=("score", "prune", "distill", "align"), **align):
    return config_from_dict({"stages": list(stages), "align": align})


def test_one_training_takes_what_it_does_not_say_from_the_recipe():
    (phase,) = align_phases(recipe(path="x.jsonl", tokens=7, lr=0.5))
    config = Config()
    assert (phase.name, phase.path, phase.tokens, phase.lr) == ("answers", "x.jsonl", 7, 0.5)
    assert (phase.min_lr, phase.warmup_steps) == (config.optim.min_lr, config.optim.warmup_steps)
    assert (phase.seq_length, phase.micro_batch_size) == (config.data.seq_length, config.train.micro_batch_size)


def test_a_phase_wins_over_the_node_and_the_node_over_the_recipe():
    phases = [{"name": "a", "path": "a.jsonl", "lr": 0.25}, {"name": "b", "path": "/b.jsonl", "seq_length": 8},
              {"name": "c", "source": "generate"}]
    first, second, third = align_phases(recipe(path="folder", lr=0.5, tokens=3, phases=phases))
    assert [phase.path for phase in (first, second, third)] == ["folder/a.jsonl", "/b.jsonl", None]
    assert [phase.lr for phase in (first, second, third)] == [0.25, 0.5, 0.5]
    assert (first.seq_length, second.seq_length, third.tokens) == (256, 8, 3)


def test_the_papers_order_is_a_recipe():
    first, second = align_phases(load_config(["align=two_phase", "align.path=chats"]))
    assert [(phase.name, phase.path) for phase in (first, second)] == [
        ("math_and_code", "chats/math_and_code.jsonl"), ("instructions", "chats/instructions.jsonl")]


@pytest.mark.parametrize(("stages", "model", "start"), [
    (["score", "prune", "distill", "align"], "auto", "distill"), (["score", "prune", "align"], "auto", "prune"),
    (["align"], "auto", "distill"), (["score", "prune", "distill", "align"], "pruned", "prune"),
    (["align"], "teacher", "teacher"), (["align"], "some/model", "align.model"),
])
def test_what_is_tuned(stages, model, start):
    assert align_inputs(recipe(stages, model=model)) == (start,)
    assert align_inputs(recipe(stages, model=model, source="generate")) == (start, "generate")


def test_the_directory_of_what_is_tuned(tmp_path):
    context = Context(config=config_from_dict({"output_dir": str(tmp_path), "teacher": {"path": "t"}}))
    assert start_path(context) == tmp_path / "run/round1/distill/checkpoint"
    context.config.align.model = "teacher"
    assert start_path(context) == Path("t")
    context.config.align.model = "some/model"
    assert start_path(context) == Path("some/model")


def test_the_recipe_of_a_training():
    """Chat data, packed, with sizes, learning rate and order of its own, and no phases of distillation."""
    config = recipe(chat_template="t.jinja", num_heldout=3, micro_batch_size=4, phases=[
        {"name": "a", "path": "a.jsonl"}, {"name": "b", "source": "generate", "seq_length": 16, "lr": 0.125}])
    context = phase_context(Context(config=config), 1)
    data = context.config.data
    assert (data.kind, data.packing, data.chat_template, data.num_heldout) == ("chat", "documents", "t.jinja", 3)
    assert (data.seq_length, data.path) == (16, "outputs/run/round1/align/b/conversations.jsonl")
    assert (context.config.optim.lr, context.config.train.micro_batch_size) == (0.125, 4)
    assert context.config.seed == config.seed + 1 and context.config.distill == config.distill


def test_only_finished_answers_that_say_something_are_taken(tmp_path):
    context = Context(config=config_from_dict({"output_dir": str(tmp_path), "align": {"source": "generate"}}))
    answers = context.stage_dir("generate") / "answers.jsonl"
    answers.parent.mkdir(parents=True)
    first, second, third = conversations(3)
    rows = [{"messages": first, "finished": True, "answer": "x"}, {"messages": second, "finished": False},
            {"messages": third, "finished": True},
            {"messages": [*third[:-1], {"role": "assistant", "content": " \n"}], "finished": True}]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    take_answers(context, 0)
    lines = (context.stage_dir("align") / "answers" / "conversations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"messages": first}, {"messages": third}]
    answers.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match=r"no answer of the teacher is finished.*generate\.max_new_tokens"):
        take_answers(context, 0)


@pytest.mark.parametrize(("key", "one", "of_phases"), [
    ("data.path", "align.path", "align.phases[1].path"), ("data.num_heldout", "align.num_heldout", "align.num_heldout"),
    ("data.seq_length or distill.phases", "align.seq_length", "align.phases[1].seq_length"),
    ("train.global_batch_size", "align.global_batch_size", "align.phases[1].global_batch_size"),
    ("optim.warmup_steps", "align.warmup_steps", "align.phases[1].warmup_steps"),
    ("data.chat_template", "align.chat_template", "align.chat_template"), ("output_dir", "output_dir", "output_dir"),
])
def test_mistakes_name_the_keys_of_align(key, one, of_phases):
    for config, named in ((recipe(), one), (recipe(phases=[{"name": "a"}, {"name": "b"}]), of_phases)):
        with pytest.raises(DataError) as error, keys_of_align(config, 1):
            raise DataError("a mistake", expected="this", found="that", key=key)
        assert str(error.value) == f"a mistake; expected this; found that (change {named})"


@pytest.fixture
def context(tmp_path):
    """A recipe of which nothing is wrong; its teacher's tokenizer has a template."""
    write_llama(UNTIED, tmp_path / "teacher")
    (tmp_path / "teacher" / "chat_template.jinja").write_text("{{ messages }}")
    chat = write_conversations(tmp_path / "chat.jsonl", conversations(30))
    return Context(config=config_from_dict({
        "output_dir": str(tmp_path), "teacher": {"path": str(tmp_path / "teacher")},
        "data": {"seq_length": UNTIED.max_position_embeddings}, "optim": {"warmup_steps": 2}, "stages": ["align"],
        "align": {"path": str(chat), "model": "teacher", "tokens": 3 * 32 * UNTIED.max_position_embeddings}}))


def test_a_recipe_that_can_be(context):
    check_align(context, UNTIED, UNTIED)


def test_a_peak_below_the_end_of_the_learning_rate_is_refused(context):
    """A small rate of its own beside the recipe's default end is easily written."""
    context.config.align.lr = context.config.optim.min_lr / 2
    with pytest.raises(ConfigError, match=r"ends above its peak; expected at most 1e-05; found 2e-05.*align\.min_lr"):
        check_align(context, UNTIED, UNTIED)


def test_a_tokenizer_without_a_template_is_refused(context):
    (Path(context.config.teacher.path) / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"no chat template.*align\.chat_template"):
        check_align(context, UNTIED, UNTIED)
    (Path(context.config.teacher.path) / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    check_align(context, UNTIED, UNTIED)


@pytest.mark.parametrize(("overrides", "named"), [
    (["align.source=teacher"], "align.source"), (["align.packing=some"], "align.packing"),
    (["align.tokens=0"], "align.tokens"), (["align.lr=-1"], "align.lr"), (["align.lr=nan"], "align.lr"),
    (["align.phases=[{name: a/b}]"], "align.phases[0].name"),
    (["align.phases=[{name: a}, {name: a}]"], "align.phases[1].name"),
    (["align.phases=[{name: checkpoint}]"], "align.phases[0].name"),
    (["align.phases=[{name: a, source: x}]"], "align.phases[0].source"),
    (["align.phases=[{name: a, tokens: 0}]"], "align.phases[0].tokens"),
    (["align.phases=[{path: a}]"], "name"), (["align.phases=[{name: a, colour: red}]"], "colour"),
])
def test_one_line_names_the_mistake(overrides, named):
    with pytest.raises(ConfigError) as error:
        load_config(overrides)
    assert named in str(error.value) and "\n" not in str(error.value)
