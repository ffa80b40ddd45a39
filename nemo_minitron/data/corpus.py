"""The embedded corpus: the Python sources of the installed `sympy`, a text that needs no download.

torch requires sympy, our constraints pin its version, and its wheel holds the same files on every machine.
The shipped list `sympy.digests` (version, then one line `digest path` per non-empty `*.py` file) says which
text that is; `verify` refuses any other text under the same name. Files that are not listed are not read.

Splits are by file and disjoint: `sha256(path) mod 100` gives train (0-95), calibration (96, 97) or heldout
(98, 99), where `path` is relative to the package (`core/add.py`).

    python -m nemo_minitron.data.corpus                   verify, then print the size of each split
    python -m nemo_minitron.data.corpus --write-digests   write the list anew, for another pinned version
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import lzma
from importlib import metadata
from pathlib import Path

from nemo_minitron.errors import DataError

SPLITS = ("train", "calibration", "heldout")
DIGESTS = Path(__file__).with_name("sympy.digests")
_DIGEST_LENGTH = 16
_KEY = "the installed sympy, or data.kind"


def corpus_root() -> Path:
    """The installed package's folder, found without importing it; `DataError` where it is not installed."""
    spec = importlib.util.find_spec("sympy")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("no embedded corpus", expected="sympy to be installed", found="no such package", key=_KEY)
    return Path(spec.submodule_search_locations[0])


def split_of(path: str) -> str:
    """The split of a file, from its posix path relative to the package alone."""
    residue = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100
    return "train" if residue < 96 else "calibration" if residue < 98 else "heldout"


def read_digests() -> tuple[str, dict[str, str]]:
    """The shipped list: the sympy version it was made from, and relative path -> digest in path order."""
    header, *lines = DIGESTS.read_text(encoding="utf-8").splitlines()
    rows = (line.split(" ", 1) for line in lines)
    return header.removeprefix("# sympy "), {path: digest for digest, path in rows}


def corpus_files(split: str) -> list[Path]:
    """The files of `split` ("train", "calibration" or "heldout"), in the order of their relative paths."""
    assert split in SPLITS, split
    root = corpus_root()
    return [root / path for path in read_digests()[1] if split_of(path) == split]


def verify() -> None:
    """Check that the installed text is the listed one.

    Raises:
        DataError: Another version of sympy is installed, or a listed file is missing or differs.
    """
    root, (version, digests) = corpus_root(), read_digests()
    found = metadata.version("sympy")
    if found != version:
        raise DataError("the embedded corpus is another text", expected=f"sympy {version}", found=f"sympy {found}",
                        key=_KEY)
    for path, digest in digests.items():
        try:
            found = _digest(root / path)
        except OSError:
            found = "no such file"
        if found != digest:
            raise DataError("the embedded corpus is another text",
                            expected=f"the sha256 of {root / path} to start with {digest}", found=found, key=_KEY)


def heldout_bytes() -> bytes:
    """The held-out files' bytes, concatenated in path order."""
    return b"".join(path.read_bytes() for path in corpus_files("heldout"))


def xz_bits_per_byte() -> float:
    """Size of the held-out text under `xz -9` in bits per byte of text: what a model should beat."""
    data = heldout_bytes()
    return 8 * len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9)) / len(data)


def write_digests() -> None:
    """Write `sympy.digests` from the installed sympy: every non-empty `*.py` file, sorted by relative path."""
    root = corpus_root()
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.stat().st_size)
    lines = [f"# sympy {metadata.version('sympy')}", *(f"{_digest(root / path)} {path}" for path in paths)]
    DIGESTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGEST_LENGTH]


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description="The embedded corpus: verify it and print its size.")
    parser.add_argument("--write-digests", action="store_true", help="write the digest list of the installed sympy")
    if parser.parse_args().write_digests:
        write_digests()
    verify()
    for split in SPLITS:
        files = corpus_files(split)
        print(f"{split:12} {len(files):5} files {sum(path.stat().st_size for path in files):10} bytes")
    print(f"heldout under xz -9: {xz_bits_per_byte():.4f} bits/byte")


if __name__ == "__main__":
    main()
