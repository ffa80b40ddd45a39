import pytest

from nemo_minitron.data.text import Document, heldout_count, read_documents, split_documents
from nemo_minitron.errors import ConfigError, DataError


def test_a_folder_is_read_in_path_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "x.md").write_text(" two \n")
    (tmp_path / "a.txt").write_bytes(b"one\r\n")
    (tmp_path / "c.py").write_text("  \n")
    (tmp_path / "d.bin").write_bytes(b"\0")
    (tmp_path / ".hidden" / "y.txt").write_text("no")
    assert read_documents(tmp_path) == [Document("a.txt", "one\r\n"), Document("b/x.md", " two \n")]


def test_a_separator_splits_strips_and_skips_empty_pieces(tmp_path):
    file = tmp_path / "all.text"
    file.write_text("one\n<|endoftext|>\n two <|endoftext|>  <|endoftext|>three")
    documents = read_documents(file, separator="<|endoftext|>")
    assert [document.text for document in documents] == ["one", "two", "three"]
    assert len({document.id for document in documents}) == 3


@pytest.mark.parametrize(("content", "found"), [
    (b"", "only whitespace"),
    (b" \n\t", "only whitespace"),
    (b"abc\0d", "NUL byte at offset 3"),
    (b"abcd\xff", "invalid UTF-8 at offset 4"),
])
def test_unusable_files_are_refused(tmp_path, content, found):
    file = tmp_path / "x.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=found) as error:
        read_documents(file)
    assert str(file) in str(error.value) and "data.path" in str(error.value)


def test_a_missing_path_and_a_folder_without_text_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"found nothing.*data\.path"):
        read_documents(tmp_path / "absent")
    with pytest.raises(DataError, match=r"found none.*data\.path"):
        read_documents(tmp_path)


DOCUMENTS = [Document(f"d{i}", str(i)) for i in range(50)]


def test_the_last_documents_are_held_out_and_calibration_stays_in_train():
    splits = split_documents(DOCUMENTS, num_heldout=5, calibration_fraction=0.2)
    assert splits["train"] == DOCUMENTS[:45]
    assert splits["heldout"] == DOCUMENTS[45:]
    assert len(splits["calibration"]) == 9
    assert splits["calibration"] == [document for document in DOCUMENTS[:45] if document in splits["calibration"]]
    assert splits["calibration"] != DOCUMENTS[:9]
    assert splits == split_documents(DOCUMENTS, num_heldout=5, calibration_fraction=0.2)


def test_every_split_has_at_least_one_document():
    splits = split_documents(DOCUMENTS[:2], heldout_fraction=0.01, calibration_fraction=0.01)
    assert {split: len(documents) for split, documents in splits.items()} == {
        "train": 1, "calibration": 1, "heldout": 1}


def test_settings_that_leave_nothing_are_refused():
    with pytest.raises(DataError, match="too few documents"):
        split_documents(DOCUMENTS[:1])
    with pytest.raises(DataError, match="num_heldout"):
        heldout_count(5, 5, 0.1)
    for bad in ({"num_heldout": 0}, {"heldout_fraction": 1.0}, {"calibration_fraction": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            split_documents(DOCUMENTS, **bad)
