import json
import os

import numpy as np
import pytest

from nemo_minitron.data import corpus, indexed
from nemo_minitron.data import prepare as prepare_module
from nemo_minitron.data.prepare import prepare
from nemo_minitron.data.tokenizer import encode_documents, load_tokenizer, train_bpe
from nemo_minitron.errors import ConfigError, DataError

TEXTS = [f"document {i}:\n    value = {i * i}\n" for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, directory, vocab_size=270)
    return directory


@pytest.fixture
def arguments(tmp_path, tokenizer_directory):
    """Arguments of `prepare` for a folder of 20 documents of which the last 4 are held out."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.txt").write_text(text)
    return {"kind": "text", "path": folder, "num_heldout": 4, "tokenizer_directory": tokenizer_directory,
            "directory": tmp_path / "prepared"}


def _stream(tokenizer_directory, texts):
    return np.concatenate(encode_documents(load_tokenizer(tokenizer_directory), texts))


def test_the_splits_hold_the_encoded_documents(arguments, tokenizer_directory):
    data = prepare(**arguments)
    assert list(data.splits) == ["train", "calibration", "heldout"]
    for split, texts in {"train": TEXTS[:16], "heldout": TEXTS[16:]}.items():
        tokens = data.open(split)
        np.testing.assert_array_equal(tokens.read(0, len(tokens)), _stream(tokenizer_directory, texts))
    assert 0 < data.splits["calibration"].num_tokens < data.splits["train"].num_tokens
    assert data.num_heldout_bytes == sum(len(text) for text in TEXTS[16:])


def test_the_second_call_writes_nothing(arguments, monkeypatch):
    first = prepare(**arguments)
    monkeypatch.setattr(indexed, "build", None)
    assert prepare(**arguments) == first


@pytest.mark.parametrize("change", ["text", "split", "tokenizer"])
def test_another_text_split_or_tokenizer_is_another_folder(arguments, tmp_path, change):
    first = prepare(**arguments)
    if change == "text":
        (arguments["path"] / "03.txt").write_text("changed")
    elif change == "split":
        arguments["num_heldout"] = 5
    else:
        train_bpe(TEXTS, tmp_path / "tokenizer", vocab_size=265)
        arguments["tokenizer_directory"] = tmp_path / "tokenizer"
    second = prepare(**arguments)
    assert second.digest != first.digest
    assert second.splits["train"].prefix.parent != first.splits["train"].prefix.parent
    assert first.open("train").num_tokens == first.splits["train"].num_tokens


@pytest.mark.parametrize("num_builds", [0, 1, 2, 3])
def test_an_interrupted_run_is_done_again(arguments, monkeypatch, num_builds):
    """Stop before build number `num_builds`, or after all three of them before `data.json` is written."""
    build, done = indexed.build, []

    def stop_early(prefix, documents, dtype):
        if len(done) == num_builds:
            raise KeyboardInterrupt
        done.append(prefix)
        return build(prefix, documents, dtype)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(indexed, "build", stop_early)
        patch.setattr(prepare_module, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(**arguments)
    assert not list(arguments["directory"].glob("*/data.json"))
    data = prepare(**arguments)
    assert data.open("heldout").num_tokens == data.splits["heldout"].num_tokens


def test_a_damaged_file_is_written_again(arguments):
    data = prepare(**arguments)
    file = indexed.bin_path(data.splits["train"].prefix)
    os.truncate(file, 10)
    with pytest.raises(DataError, match="truncated"):
        data.open("train")
    assert prepare(**arguments) == data
    assert data.open("train").num_tokens == data.splits["train"].num_tokens
    record = json.loads((file.parent / "data.json").read_text())
    assert record["file_sizes"]["train.bin"] == file.stat().st_size


def test_the_corpus_is_verified_and_split_by_file(tmp_path, monkeypatch, tokenizer_directory):
    files = {split: corpus.corpus_files(split)[:2] for split in corpus.SPLITS}
    verified = []
    monkeypatch.setattr(corpus, "corpus_files", files.__getitem__)
    monkeypatch.setattr(corpus, "verify", lambda: verified.append(True))
    data = prepare(kind="corpus", directory=tmp_path, tokenizer_directory=tokenizer_directory)
    assert verified
    for split in corpus.SPLITS:
        tokens = data.open(split)
        expected = _stream(tokenizer_directory, [file.read_text(encoding="utf-8") for file in files[split]])
        np.testing.assert_array_equal(tokens.read(0, len(tokens)), expected)
    assert data.num_heldout_bytes == sum(file.stat().st_size for file in files["heldout"])


def test_one_prefix_is_split_at_a_document(tmp_path, tokenizer_directory):
    documents = [np.arange(first, first + 5 + first) for first in range(10)]
    indexed.build(tmp_path / "mine", documents, np.int32)
    data = prepare(kind="indexed", path=tmp_path / "mine", heldout_fraction=0.2, directory=tmp_path / "unused",
                   tokenizer_directory=tokenizer_directory)
    for split, part in {"train": documents[:8], "calibration": documents[:8], "heldout": documents[8:]}.items():
        tokens = data.open(split)
        np.testing.assert_array_equal(tokens.read(0, len(tokens)), np.concatenate(part))
    assert data.num_heldout_bytes is None
    assert not (tmp_path / "unused").exists()


def test_a_folder_of_prefixes_is_used_in_place(tmp_path, tokenizer_directory):
    arguments = {"kind": "indexed", "path": tmp_path, "directory": tmp_path / "unused",
                 "tokenizer_directory": tokenizer_directory}
    indexed.build(tmp_path / "train", [np.arange(50)], np.uint16)
    with pytest.raises(DataError, match=r"heldout\.idx"):
        prepare(**arguments)
    indexed.build(tmp_path / "heldout", [np.arange(7)], np.uint16)
    without = prepare(**arguments)
    assert without.splits["calibration"] == without.splits["train"]
    assert without.splits["heldout"].num_tokens == 7
    indexed.build(tmp_path / "calibration", [np.arange(9)], np.uint16)
    assert prepare(**arguments).splits["calibration"].num_tokens == 9
    indexed.build(tmp_path / "heldout", [np.arange(1, 8)], np.uint16)
    assert prepare(**arguments).digest != without.digest


def test_unusable_settings_are_refused(arguments):
    with pytest.raises(ConfigError, match=r"corpus, text, indexed, chat; found web .*data\.kind"):
        prepare(**{**arguments, "kind": "web"})
    with pytest.raises(ConfigError, match=r"data\.path"):
        prepare(**{**arguments, "path": None})
