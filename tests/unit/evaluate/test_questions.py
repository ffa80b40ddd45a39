"""Task files: what is read, what is refused, and who wins."""

import json

import pytest

from nemo_minitron.errors import DataError
from nemo_minitron.evaluate.questions import Question, accuracy, read_questions

ROWS = [
    {"context": ["The cup held tea, so the cup", "The cup held tea, so the tea"], "continuation": " was hot.",
     "answer": 1},
    {"context": "Two and two is", "continuation": [" three", " four", " five"], "answer": 1},
    {"context": ["a", "b"], "continuation": ["c", "d"], "answer": 0},
]
READ = [Question((("The cup held tea, so the cup", " was hot."), ("The cup held tea, so the tea", " was hot.")), 1),
        Question((("Two and two is", " three"), ("Two and two is", " four"), ("Two and two is", " five")), 1),
        Question((("a", "c"), ("b", "d")), 0)]


@pytest.mark.parametrize("text", [json.dumps(ROWS), "\n".join(map(json.dumps, ROWS)) + "\n"], ids=["list", "lines"])
def test_lists_and_lines_are_read(tmp_path, text):
    (tmp_path / "task.json").write_text(text)
    assert read_questions(tmp_path / "task.json") == READ


@pytest.mark.parametrize(("row", "found"), [
    ({"instruction": "?"}, "context to be text"),
    ({**ROWS[1], "answer": 3}, "from 0 to 2; found 3"),
    ({**ROWS[1], "answer": "1"}, "answer to be an index"),
    ({**ROWS[1], "answer": True}, "answer to be an index"),
    ({**ROWS[1], "continuation": "four"}, "two or more options"),
    ({**ROWS[1], "continuation": ["four"]}, "two or more options"),
    ({**ROWS[2], "continuation": ["c", "d", "e"]}, "of equal length"),
    ({**ROWS[1], "continuation": ["", "four"]}, "an empty one"),
    ({**ROWS[1], "context": 4}, "context to be text"),
    ("row", "an object"),
])
def test_row_of_another_form_is_named(tmp_path, row, found):
    (tmp_path / "task.json").write_text(json.dumps([ROWS[0], row]))
    with pytest.raises(DataError, match=rf"row 2 of .*{found}.*importance\.depth\.task"):
        read_questions(tmp_path / "task.json")


def test_line_of_another_form_is_named(tmp_path):
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps(ROWS[0]) + "\n\n{context}\n")
    with pytest.raises(DataError, match=r"not JSON.*line 3 of "):
        read_questions(task)
    task.write_text(json.dumps(ROWS[0]) + "\n\n" + json.dumps({**ROWS[1], "answer": 9}) + "\n")
    with pytest.raises(DataError, match=r"line 3 of .*from 0 to 2; found 9"):
        read_questions(task)


def test_only_newlines_end_lines(tmp_path):
    row = {"context": "a\u2028b\x85c", "continuation": ["d", "e"], "answer": 0}
    (tmp_path / "task.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert read_questions(tmp_path / "task.jsonl")[0].options[0] == ("a\u2028b\x85c", "d")


@pytest.mark.parametrize(("text", "found"), [("[]", "empty"), ("", "empty"), ("{", "not JSON"),
                                             (None, "cannot be read")])
def test_file_without_questions_is_refused(tmp_path, text, found):
    if text is not None:
        (tmp_path / "task.json").write_text(text)
    with pytest.raises(DataError, match=found):
        read_questions(tmp_path / "task.json")


def test_smallest_loss_wins_and_the_first_of_equals():
    assert accuracy(READ, [2, 1, 5, 4, 4, 1, 1]) == 1.0
    assert accuracy(READ, [1, 2, 5, 6, 4, 1, 1]) == pytest.approx(1 / 3)
