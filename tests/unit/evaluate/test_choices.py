"""Options in tokens: where the continuation begins, what is cut off, what is refused."""

import pytest

from nemo_minitron.data.tokenizer import load_tokenizer, train_bpe
from nemo_minitron.errors import DataError
from nemo_minitron.evaluate.choices import Option, encode_options, option_batch
from nemo_minitron.evaluate.questions import Question


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe")
    train_bpe(["the cat sat on the mat and the cup was hot, that is all"] * 20, directory, vocab_size=320)
    return load_tokenizer(directory)


class Words:
    """A tokenizer of words, to which spaces are nothing."""

    bos_token_id, eos_token_id = None, None

    def __call__(self, text, **options):
        return {"input_ids": [len(word) for word in text.split()]}


def asked(*options):
    return [Question(options, 0)]


def test_continuation_is_what_follows_the_context(tokenizer):
    options = encode_options(asked(("the cat", " sat on"), ("the mat ", "was hot"), ("", "the cup")), tokenizer, 64)
    texts = [(tokenizer.decode(option.tokens[1 : -option.num_continuation]),
              tokenizer.decode(option.tokens[-option.num_continuation :])) for option in options]
    assert texts == [("the cat", " sat on"), ("the mat", " was hot"), ("", "the cup")]
    assert {option.tokens[0] for option in options} == {tokenizer.bos_token_id}


def test_token_across_the_boundary_is_judged(tokenizer):
    assert len(tokenizer("the")["input_ids"]) == 1 and len(tokenizer("cat")["input_ids"]) == 2
    (option, other) = encode_options(asked(("th", "e cat"), ("the ca", "t")), tokenizer, 64)
    assert tokenizer.decode(option.tokens[-option.num_continuation :]) == "the cat"
    assert tokenizer.decode(other.tokens[-other.num_continuation :]) == " cat"


def test_contexts_are_cut_on_the_left(tokenizer):
    question = asked(("the cat sat on the mat and", " the cup"), ("and", " the cup"))
    (whole, short), (cut, same) = (encode_options(question, tokenizer, length) for length in (64, 5))
    assert len(whole.tokens) > 6 == len(cut.tokens)
    assert cut == Option(whole.tokens[-6:], whole.num_continuation)
    assert same == short


def test_text_that_looks_like_a_special_token_is_text(tokenizer):
    (option, _) = encode_options(asked(("a", "</s> b"), ("a", "b")), tokenizer, 64)
    assert tokenizer.eos_token_id not in option.tokens
    assert tokenizer.decode(option.tokens[1:]) == "a</s> b"


@pytest.mark.parametrize(("options", "length", "found"), [
    ([("a", " b"), ("a", " ")], 8, "with tokens in place of ' '; found 0"),
    ([("a", " b"), ("a", " b c d e")], 3, "at most 3 tokens; found 4"),
    ([("", "b c")], 8, "at most 1 tokens; found 2"),  # nothing before its first token
])
def test_question_without_room_or_tokens_is_named(options, length, found):
    questions = [*asked(("a", " b"), ("aa", " b")), *asked(*options)]
    with pytest.raises(DataError, match=rf"question 2 .*{found}.*importance\.depth\.task"):
        encode_options(questions, Words(), length)


def test_mask_is_the_continuation():
    batch = option_batch([Option((1, 5, 7, 30), 2), Option((1, 9), 1)], 3, 4)
    assert batch.tokens.tolist() == [[1, 5, 7, 30], [1, 9, 0, 0], [0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.labels[batch.loss_mask.bool()].tolist() == [7, 30, 9]
