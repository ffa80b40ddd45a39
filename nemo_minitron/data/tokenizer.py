"""Tokenizers: training a byte-level BPE for source code, loading a Hugging Face one, encoding documents.

`transformers` and `tokenizers` are imported where they are used: they cost seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.artifacts import digest_files
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, EOS = "<s>", "</s>"

# Everything of a Hugging Face tokenizer that decides which ids a text gets.
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")

# What BPE may not merge across. Words take one leading sign (`.name`, `(x`, ` name`), digits stand alone, and a
# newline with its indentation is one piece, also behind punctuation (`):\n        `): 3.06 bytes/token at 2,048
# pieces on the held-out corpus, where ByteLevel's own (GPT-2) expression gives 2.86 (trained on 300 files).
_PIECES = (r"\s*[\r\n][ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
           r"| ?[^\s\p{L}\p{N}]+(?:[\r\n][ \t]*)*|\s+(?!\S)|\s+")


def train_bpe(texts: Iterable[str], directory: Path, *, vocab_size: int = 2048) -> int:
    """Train a byte-level BPE on `texts` and save it in `directory` so that `AutoTokenizer` loads it.

    `<s>` (id 0, bos) and `</s>` (id 1, eos) come first, then the 256 bytes, so every text can be encoded and
    decoded without loss. Nothing adds bos on its own: `encode_documents` does. The same texts in the same
    order give the same files. Returns the number of pieces: `vocab_size`, or fewer from too little text.

    Raises:
        DataError: `vocab_size` is below 258, the specials and bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise DataError("vocabulary too small for byte-level BPE", expected=f"at least {len(alphabet) + 2}",
                        found=str(vocab_size), key="the tokenizer's vocab_size")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS,
                                   clean_up_tokenization_spaces=False)
    fast.save_pretrained(directory)
    return int(tokenizer.get_vocab_size())


def load_tokenizer(directory: Path, *, key: str = "teacher.path") -> PreTrainedTokenizerBase:
    """Load the Hugging Face tokenizer in `directory`, from local files and without running code found there.

    `key` is what the user has to change where that fails.

    Raises:
        DataError: There is no tokenizer in `directory`, or `transformers` cannot read it.
    """
    from transformers import AutoTokenizer

    if not _tokenizer_files(directory):
        raise DataError("no tokenizer", expected=f"tokenizer.json or tokenizer.model in {directory}", found="none",
                        key=key)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises half a dozen types, tokenizers a bare Exception
        raise DataError("unreadable tokenizer", expected=f"a Hugging Face tokenizer in {directory}", found=str(error),
                        key=key) from error
    return tokenizer


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 (hex) over the tokenizer's files in `directory`."""
    return digest_files(_tokenizer_files(directory))


def _tokenizer_files(directory: Path) -> list[Path]:
    return [directory / name for name in _FILES if (directory / name).is_file()]


def num_pieces(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id: the embedding rows that the tokenizer needs."""
    return int(max(tokenizer.get_vocab().values())) + 1


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise `DataError` when the tokenizer has more pieces than the model has embedding rows (`vocab_size`)."""
    if (pieces := num_pieces(tokenizer)) > vocab_size:
        raise DataError("the tokenizer is larger than the model's vocabulary", expected=f"at most {vocab_size} pieces",
                        found=str(pieces), key="teacher.path")


def check_same_tokenizer(teacher: Path, student: Path, *, key: str) -> None:
    """Raise `DataError`, naming the first token that differs, unless both directories' tokenizers have the same tokens.

    Logits are compared token by token, so the same id has to mean the same.
    """
    if tokenizer_digest(teacher) == tokenizer_digest(student):
        return
    ours, theirs = (sorted(load_tokenizer(path, key=key).get_vocab().items(), key=lambda item: item[1])
                    for path in (teacher, student))
    for (own, own_id), (other, other_id) in zip(ours, theirs, strict=False):
        if (own, own_id) != (other, other_id):
            raise DataError("the tokenizers differ", expected=f"the teacher's token {own_id} {own!r} (in {teacher})",
                            found=f"token {other_id} {other!r} (in {student})", key=key)
    if len(ours) != len(theirs):
        longer, where = (ours, teacher) if len(ours) > len(theirs) else (theirs, student)
        token, number = longer[min(len(ours), len(theirs))]
        raise DataError("the tokenizers differ", expected=f"{len(ours)} tokens, as in {teacher}", key=key,
                        found=f"{len(theirs)} in {student}; token {number} {token!r} is in {where} alone")


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Encode each text as int32 `[num_tokens]`: one leading token, then the ids of the text.

    The leading token is bos; eos where the tokenizer has no bos; none where it has neither. Text that looks
    like a special token (a literal `</s>`) is encoded as text. Nothing is truncated.
    """
    if not texts:
        return []
    first = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), None)
    head = [] if first is None else [first]
    encoded: Any = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, truncation=False,
                             return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return [np.array(head + ids, dtype=np.int32) for ids in encoded["input_ids"]]
