"""Documents out of byte ranges of JSON lines."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.data.jsonl import read_lines
from nemo_minitron.data.text import read_documents
from nemo_minitron.errors import DataError


def write(path, texts, end="\n"):
    lines = [json.dumps({"id": i, "body": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_bytes(("\n".join(lines) + end).encode())
    return path


@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=8),
       cuts=st.lists(st.integers(0, 400), max_size=6), end=st.sampled_from(["", "\n", "\n\n"]))
def test_consecutive_ranges_give_every_line_once_wherever_they_are_cut(tmp_path_factory, texts, cuts, end):
    path = write(tmp_path_factory.mktemp("lines") / "x.jsonl", texts, end)
    bounds = [0, *sorted(min(cut, path.stat().st_size) for cut in cuts), None]
    found = [text for start, stop in itertools.pairwise(bounds)
             for text in read_lines(path, "body", start=start, end=stop)]
    assert found == texts


@pytest.mark.parametrize(("line", "message"), [
    (b'{"body": ', "malformed JSON line.*line 3"),
    (b'["body"]', "no object in line 3.*json_key"),
    (b'{"text": "x"}', "only 'text' in line 3.*json_key"),
    (b'{"body": 7}', "a int there in line 3.*json_key"),
    (b'{"body": null}', "a NoneType there in line 3"),
    (b'{"body": "\xff"}', "UTF-8 .*line 3"),
    (b'{"body": "\\udc00"}', "half a surrogate pair .*line 3"),
    (b'{"body": ' + b"[" * 100_000, "malformed JSON line.*line 3"),
])
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "x.jsonl", ["one", "two"])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=message):
        list(read_lines(path, "body"))


def test_a_recipe_reads_json_lines_as_documents(tmp_path):
    write(tmp_path / "b.jsonl", ["one", "  ", "two"])
    (tmp_path / "a.txt").write_text("zero")
    documents = read_documents(tmp_path, json_key="body")
    assert [(document.id, document.text) for document in documents] == [
        ("a.txt", "zero"), ("b.jsonl#0", "one"), ("b.jsonl#2", "two")]


def test_a_key_without_text_is_refused(tmp_path):
    write(tmp_path / "x.jsonl", ["", " \n"])
    with pytest.raises(DataError, match="only whitespace"):
        read_documents(tmp_path, json_key="body")
