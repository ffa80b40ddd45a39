"""What identifies the user's data."""

from nemo_minitron.data.source import resolve_kind, source_digest


def test_auto_is_told_by_the_path(tmp_path):
    (tmp_path / "tokens.idx").write_bytes(b"")
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "train.idx").write_bytes(b"")
    assert resolve_kind("auto", None) == "corpus"
    assert resolve_kind("auto", str(tmp_path / "tokens")) == "indexed"
    assert resolve_kind("auto", str(tmp_path / "split")) == "indexed"
    assert resolve_kind("auto", str(tmp_path)) == "text"
    assert resolve_kind("text", None) == "text"


def test_the_digest_follows_the_text_and_not_the_place(tmp_path):
    digests = []
    for number, text in enumerate(("one", "one", "two")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.txt").write_text(text)
        digests.append(source_digest("text", str(folder)))
    assert digests[0] == digests[1] != digests[2]
    (tmp_path / "0" / "b.txt").write_text("more")
    assert source_digest("text", str(tmp_path / "0")) != digests[0]
    assert source_digest("corpus", None) is None


def test_token_files_are_told_by_index_and_size(tmp_path):
    (tmp_path / "t.idx").write_bytes(b"index")
    (tmp_path / "t.bin").write_bytes(b"1234")
    before = source_digest("indexed", str(tmp_path / "t"))
    (tmp_path / "t.bin").write_bytes(b"12345678")
    longer = source_digest("indexed", str(tmp_path / "t"))
    (tmp_path / "t.idx").write_bytes(b"INDEX")
    assert len({before, longer, source_digest("indexed", str(tmp_path / "t"))}) == 3
