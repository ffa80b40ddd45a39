"""The rest of a Hugging Face directory: tokenizer files, and appearing under the final name only when whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# What decides how text becomes token ids (the digest), and what else travels with it.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")
CHAT_TEMPLATE = "chat_template.jinja"
COPIED_FILES = (*TOKENIZER_FILES, CHAT_TEMPLATE, "generation_config.json")


def tokenizer_files(directory: Path) -> list[Path]:
    """The files in `directory` that decide how text becomes tokens; those that exist."""
    return [path for name in TOKENIZER_FILES if (path := Path(directory) / name).is_file()]


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy tokenizer files and `generation_config.json`, those that exist, into the directory `target`."""
    for name in COPIED_FILES:
        if (path := Path(source) / name).is_file():
            shutil.copyfile(path, Path(target) / name)


def partial_directory(directory: Path) -> Path:
    """Where a checkpoint is put together before it is renamed to `directory`."""
    return directory.with_name(directory.name + ".partial")


def prepare_partial(directory: Path) -> Path:
    """Make the empty partial directory of `directory`, dropping what an interrupted run left."""
    partial = partial_directory(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish_partial(directory: Path) -> None:
    """Rename the partial directory to `directory`, replacing an earlier one."""
    replaced = directory.with_name(directory.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        os.rename(directory, replaced)
    os.rename(partial_directory(directory), directory)
    shutil.rmtree(replaced, ignore_errors=True)
