"""The file of answers: written block by block, and the same after a kill at any moment."""

import json

import pytest

from nemo_minitron.generate.answers import write_answers

NUM_PROMPTS, BLOCK = 11, 4


def make(path, answer):
    write_answers(path, NUM_PROMPTS, BLOCK, answer, rank=0, share=lambda value: value, say=lambda line: None)


def rows(first, last):
    return [{"answer": f"caf\u00e9 {number}"} for number in range(first, last)]


def test_one_line_a_prompt(tmp_path):
    make(tmp_path / "a.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == rows(0, NUM_PROMPTS)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]


@pytest.mark.parametrize("torn", [b"", b'{"answer": "ca', b'{"answer": "x"}\n', b'{"answer": "x"}\n{"an'],
                         ids=["whole", "half a line", "part of a block", "both"])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_killed_run_goes_on_to_the_same_file(tmp_path, blocks, torn):
    make(tmp_path / "undisturbed.jsonl", rows)

    def killed(first, last):
        if first == blocks * BLOCK:
            raise KeyboardInterrupt
        return rows(first, last)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a.jsonl", killed)
    assert not (tmp_path / "a.jsonl").exists()
    with open(tmp_path / "a.jsonl.partial", "ab") as partial:
        partial.write(torn)
    asked = []

    def answer(first, last):
        asked.append(first)
        return rows(first, last)

    make(tmp_path / "a.jsonl", answer)
    assert asked == list(range(blocks * BLOCK, NUM_PROMPTS, BLOCK))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_a_file_that_is_there_is_left(tmp_path):
    (tmp_path / "a.jsonl").write_text("done\n")
    make(tmp_path / "a.jsonl", lambda first, last: pytest.fail("asked again"))
    assert (tmp_path / "a.jsonl").read_text() == "done\n"
