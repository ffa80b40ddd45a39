import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from nemo_minitron.data.tokenizer import (
    check_tokenizer,
    encode_documents,
    load_tokenizer,
    num_pieces,
    tokenizer_digest,
    train_bpe,
)
from nemo_minitron.errors import DataError

SOURCE = "def f(x):\n    if x:\n        return x + 1\n    return 23\n\n\n" * 20
AWKWARD = ["", " \n\n\t x\r\n", "é 漢字 \U0001f600", "</s> is <s>text</s>", SOURCE]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    assert train_bpe([SOURCE], directory, vocab_size=275) == 275
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


def test_loads_with_its_specials(tokenizer):
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 1)
    assert num_pieces(tokenizer) == len(tokenizer) == 275
    assert tokenizer("x")["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", AWKWARD)
def test_one_bos_then_text_that_decodes_without_loss(tokenizer, text):
    (tokens,) = encode_documents(tokenizer, [text])
    assert tokens.dtype == np.int32 and tokens[0] == 0
    assert not np.isin(tokens[1:], [0, 1]).any()
    assert tokenizer.decode(tokens[1:]) == text


def test_documents_are_encoded_alone_and_in_order(tokenizer):
    together = encode_documents(tokenizer, AWKWARD)
    for tokens, text in zip(together, AWKWARD, strict=True):
        np.testing.assert_array_equal(tokens, encode_documents(tokenizer, [text])[0])
    assert encode_documents(tokenizer, []) == []


def test_a_newline_and_its_indentation_can_become_one_piece(tmp_path):
    train_bpe(["a = b\n        c = d):\n    e\n" * 20], tmp_path, vocab_size=300)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.tokenize("b\n        c")) == 3
    assert len(tokenizer.tokenize("d):\n    e")) == 3


def test_the_leading_token_falls_back_to_eos_then_nothing(tokenizer):
    backend = tokenizer.backend_tokenizer
    text = encode_documents(tokenizer, ["x"])[0][1:].tolist()
    with_eos = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    bare = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert encode_documents(with_eos, ["x"])[0].tolist() == [1, *text]
    assert encode_documents(bare, ["x"])[0].tolist() == text


def test_training_is_deterministic(directory, tmp_path):
    train_bpe([SOURCE], tmp_path / "again", vocab_size=275)
    assert tokenizer_digest(tmp_path / "again") == tokenizer_digest(directory)
    train_bpe([SOURCE], tmp_path / "other", vocab_size=270)
    assert tokenizer_digest(tmp_path / "other") != tokenizer_digest(directory)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer):
    check_tokenizer(tokenizer, 275)
    with pytest.raises(DataError, match=r"at most 274 pieces; found 275 .*teacher\.path"):
        check_tokenizer(tokenizer, 274)


def test_unusable_directories_and_sizes_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least 258"):
        train_bpe([SOURCE], tmp_path, vocab_size=257)
    with pytest.raises(DataError, match=r"no tokenizer.*teacher\.path"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="unreadable tokenizer"):
        load_tokenizer(tmp_path)
