"""Files of prompts: what is read, what is refused, and answers that the chat reader takes."""

import json

import pytest

from nemo_minitron.data.conversations import messages_of, read_conversations
from nemo_minitron.errors import DataError
from nemo_minitron.generate.prompts import answered, read_prompts

USER = {"role": "user", "content": "Hi"}
CHAT = {"messages": [{"role": "system", "content": "Be kind."}, USER], "source": "here"}


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_texts_and_chats_are_read(tmp_path):
    rows = [{"prompt": "import"}, CHAT]
    assert read_prompts(write(tmp_path / "p.jsonl", rows)) == rows


@pytest.mark.parametrize(("row", "found"), [
    ("text", "either prompt or messages; found str"),
    ({"text": "?"}, "either prompt or messages; found text"),
    ({"prompt": "?", **CHAT}, "either prompt or messages"),
    ({"prompt": 3}, "prompt to be text; found 3"),
    ({"messages": []}, "messages with content and a role"),
    ({"messages": [{"content": "Hi"}]}, "messages with content and a role of system, user, assistant, tool"),
    ({"messages": [{"role": "human", "content": "Hi"}]}, "a role of system, user, assistant, tool"),
    ({"messages": [{"role": "user"}]}, "messages with content"),
    ({"messages": [USER, {"role": "assistant", "content": "Hello"}]}, "a chat that waits for an answer"),
    ({"messages": [CHAT["messages"][0]]}, "a message of the user before the first answer"),
    ({"messages": [{"role": "assistant", "content": "Hello"}, USER]}, "a message of the user before the first answer"),
])
def test_a_row_of_another_form_is_named(tmp_path, row, found):
    with pytest.raises(DataError, match=rf"line 2 of .*p\.jsonl.*{found}.*generate\.prompts"):
        read_prompts(write(tmp_path / "p.jsonl", [CHAT, row]))


@pytest.mark.parametrize(("text", "found"), [("", "no prompts"), ("\n", "no prompts"), ("{", "line 1 of"),
                                             (None, "cannot be read")])
def test_a_file_without_prompts_is_refused(tmp_path, text, found):
    if text is not None:
        (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=rf"{found}.*generate\.prompts"):
        read_prompts(str(tmp_path / "p.jsonl"))
    with pytest.raises(DataError, match=r"no prompts.*generate\.prompts"):
        read_prompts(None)


def test_answers_are_conversations_of_the_chat_reader(tmp_path):
    made = [answered(row, answer, finished=True) for row, answer in (({"prompt": "import"}, " sympy"), (CHAT, "Hello"))]
    assert [(row["answer"], row["finished"]) for row in made] == [(" sympy", True), ("Hello", True)]
    assert made[1]["source"] == "here"
    write(tmp_path / "answers.jsonl", made)
    assert [messages_of(document) for document in read_conversations(tmp_path / "answers.jsonl")] == [
        [{"role": "user", "content": "import"}, {"role": "assistant", "content": " sympy"}],
        [*CHAT["messages"], {"role": "assistant", "content": "Hello"}]]
