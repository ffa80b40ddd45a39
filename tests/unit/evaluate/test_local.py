"""Local task files: every form that is read, and one line for those that are not."""

import csv
import json

import pytest

from nemo_minitron.errors import DataError
from nemo_minitron.evaluate.local import read_local, task_files

WINOGRANDE = {"instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: "
                             "Ann gave Bo a cake, so _ was glad.\n\n"
                             "Option1: Ann Option2: Bo Answer format: option1/option2",
              "input": "", "output": "the correct answer is option2", "answer": "option2"}
ARC = {"instruction": "Please choose the correct answer to the question: What melts?\n\nAnswer1: warm ice "
                      "Answer2: stone Answer3: air\n\nAnswer format: answer1/answer2/answer3",
       "input": "", "output": "the correct answer is answer1", "answer": "answer1"}
QUESTION = {"context": "Two and two is", "continuation": [" three", " four"], "answer": 1}
MMLU_HEAD = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
MMLU_ROW = ["Which, if any?", "a", "b", "c", "d", "3"]


def write_json(path, rows):
    path.write_text(json.dumps(rows))
    return path


def write_mmlu(folder, row=MMLU_ROW, head=MMLU_HEAD, splits=("test", "dev")):
    for split in splits:
        (folder / split).mkdir(parents=True, exist_ok=True)
        with open(folder / split / f"anatomy_{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([head, MMLU_ROW if split == "dev" else row])
    return folder


def test_winogrande_is_taken_apart(tmp_path):
    local = read_local(write_json(tmp_path / "test.json", [WINOGRANDE]))
    assert local.form == "winogrande"
    assert local.subjects == {"": {"test": [{
        "sentence": "Ann gave Bo a cake, so _ was glad.", "option1": "Ann", "option2": "Bo", "answer": "2"}]}}


def test_arc_is_taken_apart(tmp_path):
    local = read_local(write_json(tmp_path / "test.json", [ARC]))
    assert local.form == "arc"
    assert local.subjects == {"": {"test": [{
        "question": "What melts?", "choices": {"text": ["warm ice", "stone", "air"], "label": ["1", "2", "3"]},
        "answerKey": "1"}]}}


def test_mmlu_is_read_by_subject(tmp_path):
    local = read_local(write_mmlu(tmp_path))
    row = {"question": "Which, if any?", "choices": ["a", "b", "c", "d"], "answer": 3}
    assert (local.form, local.subjects) == ("mmlu", {"anatomy": {"test": [row], "dev": [row]}})
    assert [path.name for path in task_files(tmp_path)] == ["anatomy_dev.csv", "anatomy_test.csv"]


def test_anything_else_is_questions(tmp_path):
    local = read_local(write_json(tmp_path / "task.json", [QUESTION]))
    assert local.form == "questions"
    assert local.questions[0].options == (("Two and two is", " three"), ("Two and two is", " four"))


@pytest.mark.parametrize(("first", "change", "found"), [
    (WINOGRANDE, {"answer": "option3"}, "option1 or option2 as the answer; found 1 of them, and 'option3'"),
    (WINOGRANDE, {"instruction": WINOGRANDE["instruction"].replace("_", "he")}, "one _ in the sentence.*0 of them"),
    (WINOGRANDE, {"instruction": "Who?"}, "a sentence with Option1 and Option2; found 'Who\\?'"),
    (WINOGRANDE, {"instruction": None}, "a sentence with Option1 and Option2; found None"),
    (ARC, {"answer": "answer4"}, "an answer from answer1 to answer3; found 'answer4'"),
    (ARC, {"instruction": "What?"}, "a question with Answer1, Answer2"),
    (QUESTION, {"answer": 2}, "answer to be an index from 0 to 1; found 2"),
])
def test_a_row_of_another_form_is_named(tmp_path, first, change, found):
    path = write_json(tmp_path / "test.json", [first, {**first, **change}])
    with pytest.raises(DataError, match=rf"row 2 of .*test\.json.*{found}.*evaluate\.tasks"):
        read_local(path)


@pytest.mark.parametrize(("row", "head", "found"), [
    ([*MMLU_ROW[:5], "4"], MMLU_HEAD, "row 1 of .*anatomy_test.csv.*an answer from 0 to 3; found .* with '4'"),
    (MMLU_ROW[:5], MMLU_HEAD, "row 1 of .*anatomy_test.csv"),
    ([*MMLU_ROW, "more"], MMLU_HEAD, "row 1 of .*anatomy_test.csv"),
    (MMLU_ROW, ["question", "a", "b", "c", "d", "answer"], "row 1 of .*found question,a,b,c,d,answer"),
])
def test_csv_of_another_form_is_named(tmp_path, row, head, found):
    with pytest.raises(DataError, match=rf"{found}.*evaluate\.tasks"):
        read_local(write_mmlu(tmp_path, row, head))


@pytest.mark.parametrize(("splits", "found"), [((), "expected test/SUBJECT_test.csv"), (("test",), "cannot be read")])
def test_a_folder_without_mmlu_is_refused(tmp_path, splits, found):
    with pytest.raises(DataError, match=found):
        read_local(write_mmlu(tmp_path, splits=splits))


@pytest.mark.parametrize("text", [None, "", "{", "[]", "[1]"])
def test_a_file_without_questions_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "test.json").write_text(text)
    with pytest.raises(DataError, match=r"evaluate\.tasks"):
        read_local(tmp_path / "test.json")
