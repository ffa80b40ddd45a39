"""The shipped conversations are what their script makes of the embedded corpus."""

import runpy
import sys

import pytest

from nemo_minitron.compose import shipped_model
from nemo_minitron.data.conversations import messages_of, read_conversations
from nemo_minitron.generate.prompts import read_prompts


@pytest.mark.slow
def test_the_files_are_those_that_the_script_makes(tmp_path, monkeypatch):
    folder = shipped_model("sympy-chat")
    monkeypatch.setattr(sys, "argv", ["make.py", str(tmp_path)])
    runpy.run_path(f"{folder}/make.py", run_name="__main__")
    for name in ("conversations.jsonl", "prompts.jsonl"):
        with open(f"{folder}/{name}", "rb") as shipped:
            assert (tmp_path / name).read_bytes() == shipped.read(), name
    asked = {messages_of(document)[0]["content"] for document in read_conversations(tmp_path / "conversations.jsonl")}
    prompts = {row["prompt"] for row in read_prompts(str(tmp_path / "prompts.jsonl"))}
    assert (len(asked), len(prompts)) == (800, 200) and not asked & prompts
