"""The text that the stage `initialize` trains its tokenizer on."""

import json

import pytest

from nemo_minitron.compose import load_config
from nemo_minitron.stages.context import Context
from nemo_minitron.stages.initialize import _train_texts


@pytest.fixture
def sources(tmp_path):
    """A folder of text files, and JSON lines with the text under another key."""
    (tmp_path / "a").mkdir()
    for i in range(4):
        (tmp_path / "a" / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(4)))
    return tmp_path


def texts(*overrides):
    return _train_texts(Context(config=load_config(["data.num_heldout=1", "data.json_key=body", *overrides])))


def test_json_lines_are_read_under_their_key(sources):
    assert texts(f"data.path={sources / 'b.jsonl'}") == ["line 0", "line 1", "line 2"]


def test_a_blend_gives_the_train_text_of_every_source(sources):
    blend = f"[{{name: a, path: {sources / 'a'}}}, {{name: b, path: {sources / 'b.jsonl'}}}]"
    assert texts(f"data.blend={blend}") == ["text 0", "text 1", "text 2", "line 0", "line 1", "line 2"]
