"""The samples of a split, for the stages that run a model: rank 0 tokenizes, the others find it done."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.arch import ArchSpec
from nemo_minitron.data.batch import TokenSamples
from nemo_minitron.data.prepare import PreparedData, prepare
from nemo_minitron.data.source import resolve_kind
from nemo_minitron.data.tokenizer import check_tokenizer, load_tokenizer
from nemo_minitron.stages.context import Context


def prepared_data(context: Context, tokenizer_directory: Path, arch: ArchSpec) -> PreparedData:
    """Token files of the recipe's data under this tokenizer; every rank must call this.

    Raises:
        ConfigError: samples longer than the model's context.
        DataError: text or a tokenizer that cannot be used, found on rank 0 first.
    """
    data = context.config.data
    context.check_seq_length(arch)
    check_tokenizer(load_tokenizer(tokenizer_directory), arch.vocab_size)

    def find_or_make() -> PreparedData:
        return prepare(
            kind=resolve_kind(data.kind, data.path), directory=context.data_dir,
            tokenizer_directory=tokenizer_directory, path=None if data.path is None else Path(data.path),
            separator=data.separator,
            num_heldout=data.num_heldout, heldout_fraction=data.heldout_fraction,
            calibration_fraction=data.calibration_fraction,
        )

    made = find_or_make() if context.rank == 0 else None
    context.barrier()
    return made or find_or_make()


def split_samples(context: Context, prepared: PreparedData, split: str, arch: ArchSpec) -> TokenSamples:
    """Samples of "train", "calibration" or "heldout"."""
    return TokenSamples(prepared.open(split), context.config.data.seq_length, vocab_size=arch.vocab_size)
