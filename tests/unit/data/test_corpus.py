import hashlib
import lzma

import pytest

from nemo_minitron.data import corpus
from nemo_minitron.errors import DataError


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """A stand-in for sympy: 300 small files, one of them empty, with its own digest list."""
    root = tmp_path / "sympy"
    (root / "core").mkdir(parents=True)
    for i in range(300):
        (root / "core" / f"m{i}.py").write_text(f"x = {i}\n")
    (root / "core" / "__init__.py").write_text("")
    monkeypatch.setattr(corpus, "corpus_root", lambda: root)
    monkeypatch.setattr(corpus, "DIGESTS", tmp_path / "list.digests")
    corpus.write_digests()
    return root


def test_shipped_list_fits_the_installed_sympy():
    corpus.verify()


def test_shipped_splits_are_disjoint_and_hold_all_files():
    splits = {split: set(corpus.corpus_files(split)) for split in corpus.SPLITS}
    assert {split: len(files) for split, files in splits.items()} == {"train": 1388, "calibration": 32, "heldout": 32}
    root = corpus.corpus_root()
    assert set.union(*splits.values()) == {path for path in root.rglob("*.py") if path.stat().st_size}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values()))


def test_split_follows_from_the_path_alone():
    residue = int(hashlib.sha256(b"core/symbol.py").hexdigest(), 16) % 100
    assert residue in (98, 99)
    assert corpus.split_of("core/symbol.py") == "heldout"


def test_files_come_in_path_order_without_empty_ones(small_corpus):
    names = [path.relative_to(small_corpus).as_posix() for path in corpus.corpus_files("train")]
    assert names == sorted(names)
    assert sum(len(corpus.corpus_files(split)) for split in corpus.SPLITS) == 300


def test_a_changed_file_is_refused_by_name(small_corpus):
    (small_corpus / "core" / "m7.py").write_text("x = 8\n")
    with pytest.raises(DataError, match=r"core/m7\.py"):
        corpus.verify()


def test_a_missing_file_is_refused_by_name(small_corpus):
    (small_corpus / "core" / "m7.py").unlink()
    with pytest.raises(DataError, match=r"core/m7\.py.*no such file"):
        corpus.verify()


def test_another_version_is_refused_with_both_versions(small_corpus, monkeypatch):
    shipped = corpus.read_digests()[0]
    monkeypatch.setattr(corpus.metadata, "version", lambda name: "1.13.3")
    with pytest.raises(DataError, match=rf"expected sympy {shipped}; found sympy 1\.13\.3"):
        corpus.verify()


def test_xz_counts_bits_per_byte_of_the_heldout_text(small_corpus):
    data = b"".join(path.read_bytes() for path in corpus.corpus_files("heldout"))
    assert data == corpus.heldout_bytes() and data
    assert corpus.xz_bits_per_byte() == 8 * len(lzma.compress(data, preset=9)) / len(data)
