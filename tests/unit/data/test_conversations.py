import json

import pytest

from nemo_minitron.data.conversations import messages_of, read_conversations
from nemo_minitron.errors import DataError
from tests.support.chats import conversation, write_conversations

GOOD = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}


def test_every_line_of_every_file_is_a_conversation(tmp_path):
    first, second = conversation("a", "b"), conversation("c", "d", "e", system="s")
    write_conversations(tmp_path / "in" / "two.jsonl", [second])
    path = tmp_path / "in" / "one.jsonl"
    path.write_text(json.dumps({"id": 7, "messages": first}) + "\n\n" + json.dumps({"messages": second}))
    (tmp_path / "in" / "notes.txt").write_text("no conversation")
    found = read_conversations(tmp_path / "in")
    assert [document.id for document in found] == ["one.jsonl:1", "one.jsonl:3", "two.jsonl:1"]
    assert [messages_of(document) for document in found] == [first, second, second]
    assert read_conversations(path) == found[:2]


def test_other_keys_of_a_message_are_passed_over(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "é\n", "weight": 1}]}))
    (found,) = read_conversations(path)
    assert messages_of(found) == [{"role": "user", "content": "é\n"}]


@pytest.mark.parametrize(("record", "named"), [
    ({"text": "hello"}, "{text: str}"),
    ([1], "a list"),
    ({"messages": []}, "messages: list"),
    ({"messages": "hello"}, "messages: str"),
    ({"messages": ["hello"]}, "a str in message 1"),
    ({"messages": [GOOD["messages"][0], {"content": "x"}]}, "{content: str} in message 2"),
    ({"messages": [{"from": "human", "value": "x"}]}, 'expected a "role" in every message'),
    ({"messages": [{"role": "robot", "content": "x"}]}, "'robot' in message 1"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "['user'] in message 1"),
    ({"messages": [{"role": "user", "content": None}]}, "{role: str, content: NoneType} in message 1"),
    ({"messages": [{"role": "user"}]}, "{role: str} in message 1"),
    ({"messages": [{"role": "system", "content": "x"}, GOOD["messages"][1]]}, "before the first answer"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
])
def test_a_line_that_is_no_conversation_is_named(tmp_path, record, named):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "", json.dumps(record), json.dumps(GOOD)]))
    with pytest.raises(DataError) as error:
        read_conversations(path)
    assert named in str(error.value) and f"line 3 of {path}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "named"), [(b"{", "in line 1"), (b'{"messages": "\xff"}', "UTF-8")])
def test_a_line_that_is_no_json_is_named(tmp_path, content, named):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=named):
        read_conversations(tmp_path / "x.jsonl")


def test_nothing_there_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for path, named in [("nowhere", "found nothing"), ("folder", "0 such files"), ("empty.jsonl", "an empty file")]:
        with pytest.raises(DataError, match=named):
            read_conversations(tmp_path / path)
