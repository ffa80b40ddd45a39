import numpy as np
import pytest

from nemo_minitron.data.chat import chat_template, encode_conversation
from nemo_minitron.data.documents import DocumentSamples
from nemo_minitron.data.prepare import prepare
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import DataError
from tests.support.chats import (
    CHATML,
    FORGETFUL,
    MARKED,
    conversation,
    conversations,
    train_tokenizer,
    write_conversations,
)

TALK = conversation("say red", "red", "say old cat", "old cat", system="be brief")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


def said(tokenizer, ids, answers):
    """The text of the answers alone, and of all."""
    return tokenizer.decode(ids[answers == 1]), tokenizer.decode(ids)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["from prompts", "marked"])
def test_answers_are_what_the_assistant_says(tokenizer, template):
    ids, answers = encode_conversation(tokenizer, template, TALK, "x")
    assert (ids.dtype, answers.dtype) == (np.int32, np.uint8)
    of_answers, of_all = said(tokenizer, ids, answers)
    assert of_answers == "red<|im_end|>\nold cat<|im_end|>\n"
    assert of_all == tokenizer.apply_chat_template(TALK, chat_template=template, tokenize=False)
    assert ids.tolist() == tokenizer.apply_chat_template(TALK, chat_template=template)


def test_prompts_tell_the_same_tokens_as_marks(tokenizer):
    for messages in conversations(40):
        for mine, marked in zip(encode_conversation(tokenizer, CHATML, messages, "x"),
                                encode_conversation(tokenizer, MARKED, messages, "x"), strict=True):
            np.testing.assert_array_equal(mine, marked)


def test_a_prompt_without_an_answer_has_none(tokenizer):
    _, answers = encode_conversation(tokenizer, CHATML, TALK[:2], "x")
    assert not answers.any()


@pytest.mark.parametrize(("template", "named"), [
    ("{{ raise_exception('no system messages') }}", "no system messages"),
    ("{% for %}", "TemplateSyntaxError"),
    ("{{ messages[0].content + 1 }}", "TypeError"),
    (FORGETFUL, "message 3 of chat.jsonl:7"),
    ("{{ '' }}", "without tokens"),
])
def test_a_template_that_cannot_be_used_is_one_line(tokenizer, template, named):
    with pytest.raises(DataError) as error:
        encode_conversation(tokenizer, template, TALK, "chat.jsonl:7")
    line = str(error.value)
    assert named in line and "chat.jsonl:7" in line and "data.chat_template" in line and "\n" not in line


def test_the_template_is_the_tokenizers_or_a_files(tokenizer, tmp_path):
    assert chat_template(tokenizer, None) == CHATML
    (tmp_path / "own.jinja").write_text(MARKED)
    assert chat_template(tokenizer, tmp_path / "own.jinja") == MARKED
    with pytest.raises(DataError, match=r"nowhere\.jinja.*data\.chat_template"):
        chat_template(tokenizer, tmp_path / "nowhere.jinja")


def test_without_a_template_there_is_one_clear_line(tmp_path):
    plain = load_tokenizer(train_tokenizer(tmp_path / "plain", template=None))
    with pytest.raises(DataError, match=r"no chat template.*data\.chat_template"):
        chat_template(plain, None)


@pytest.fixture
def arguments(tmp_path, directory):
    path = write_conversations(tmp_path / "chat.jsonl", conversations(24))
    return {"kind": "chat", "path": path, "num_heldout": 4, "tokenizer_directory": directory,
            "directory": tmp_path / "prepared", "calibration_fraction": 0.25}


def test_every_split_has_tokens_and_answers(arguments, tokenizer):
    data = prepare(**arguments)
    assert data.chat and data.num_heldout_bytes is None
    for split, messages in {"train": conversations(24)[:20], "heldout": conversations(24)[20:]}.items():
        expected = [encode_conversation(tokenizer, CHATML, each, "x") for each in messages]
        tokens, answers = data.open(split), data.open_answers(split)
        np.testing.assert_array_equal(tokens.read(0, len(tokens)), np.concatenate([ids for ids, _ in expected]))
        np.testing.assert_array_equal(answers.read(0, len(answers)), np.concatenate([mask for _, mask in expected]))
        np.testing.assert_array_equal(np.diff(tokens.document_offsets()), [len(ids) for ids, _ in expected])
    assert len(data.open("calibration").document_offsets()) == 6


def test_the_second_call_writes_nothing_and_what_is_incomplete_is_made_anew(arguments):
    first = prepare(**arguments)
    (folder,) = arguments["directory"].iterdir()
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert prepare(**arguments) == first
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == times
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "train_answers.bin").write_bytes(b"\1")
    assert prepare(**arguments) == first
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == contents


@pytest.mark.parametrize("change", ["template", "words", "split"])
def test_another_template_text_or_split_is_another_folder(arguments, tmp_path, change):
    first = prepare(**arguments)
    if change == "template":
        (tmp_path / "own.jinja").write_text(CHATML.replace("im_end", "im_start"))
        arguments["chat_template"] = tmp_path / "own.jinja"
    elif change == "words":
        write_conversations(arguments["path"], conversations(24, seed=2))
    else:
        arguments["num_heldout"] = 5
    assert prepare(**arguments).digest != first.digest


def test_samples_predict_answers_alone(arguments, tokenizer):
    data = prepare(**arguments)
    samples = DocumentSamples(data.open("heldout"), 256, answers=data.open_answers("heldout"))
    batch = samples.batch(range(samples.num_evaluation_samples))
    counted = batch.labels[batch.loss_mask.bool()]
    expected = "".join(message["content"] + "<|im_end|>\n" for each in conversations(24)[20:]
                       for message in each if message["role"] == "assistant")
    assert sorted(tokenizer.decode(counted).split()) == sorted(expected.split())
