import dataclasses
import json

import pytest

from nemo_minitron.compose import config_from_dict
from nemo_minitron.errors import UserError
from nemo_minitron.stages import candidates, registry
from nemo_minitron.stages.candidates import candidates_in, curve, rung_sizes
from nemo_minitron.stages.context import Context
from tests.support.checkpoints import UNTIED, write_llama

SEARCH = {"ffn_hidden_size": [32, 28, 24, 20, 16], "divisors": {"ffn_hidden_size": 4}, "tokens": 4096, "rungs": 3}


@pytest.fixture
def context(tmp_path):
    write_llama(UNTIED, tmp_path / "teacher")
    return Context(config=config_from_dict({
        "output_dir": str(tmp_path), "teacher": {"path": str(tmp_path / "teacher")}, "data": {"seq_length": 32},
        "train": {"global_batch_size": 8, "micro_batch_size": 2}, "search": SEARCH}))


def look(step, loss):
    return json.dumps({"step": step, "tokens": 256 * step, "heldout_ce": loss}) + "\n"


def write_curve(found, name, text):
    folder = found.contexts[name].stage_dir("distill")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(text)


def test_a_curve_ends_before_a_line_that_is_being_written(context):
    found = candidates_in(context)
    name = next(iter(found.archs))
    line = json.dumps({"step": 6, "loss": 1.0}) + "\n"
    write_curve(found, name, look(2, 5.0) + line + look(4, 4.5) + look(4, 4.0) + look(8, 3.0)[:-5])
    assert curve(found.contexts[name], 16) == ((2, 512, 5.0), (4, 1024, 4.0)), "of a step the last line counts"
    assert curve(found.contexts[name], 3) == ((2, 512, 5.0),)


def test_who_is_left_at_a_rung_follows_from_the_files(context, monkeypatch):
    found = candidates_in(context)
    names, through = list(found.archs), set()
    assert found.ends == (4, 8, 16) and rung_sizes(context.config, UNTIED) == [5, 3, 2]
    monkeypatch.setattr(candidates.Candidates, "is_through", lambda self, name, rung: (name, rung) in through)
    assert found.at_rung(0) == names
    for number, name in enumerate(names):
        write_curve(found, name, look(4, 5.0 - number) + look(8, 1.0 + number))  # the order turns round
    through |= {(name, 0) for name in names[1:]}
    with pytest.raises(UserError, match=rf"rung before is not finished.*step 4.*{names[0]} first"):
        found.at_rung(1)
    through.add((names[0], 0))
    left = found.at_rung(1)
    assert left == names[-3:]
    through |= {(name, 1) for name in left}
    assert found.at_rung(2) == left[:2]


def test_groups_do_not_change_what_a_candidate_s_result_depends_on(context):
    divided = dataclasses.replace(context, config=dataclasses.replace(
        context.config, parallel=dataclasses.replace(context.config.parallel, dp=4, search_groups=2)))
    assert registry.stage_config(context, "search") == registry.stage_config(divided, "search")
    for one, other in zip(candidates_in(context).contexts.values(), candidates_in(divided).contexts.values(),
                          strict=True):
        assert one.stage_dir("distill") == other.stage_dir("distill")
        assert registry.stage_config(one, "distill") == registry.stage_config(other, "distill")
