"""The samples of a split, for the stages that run a model: rank 0 tokenizes, the others find it done."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.arch import ArchSpec
from nemo_minitron.artifacts import digest_json
from nemo_minitron.data.batch import BlendedSamples, Samples, TokenSamples
from nemo_minitron.data.documents import DocumentSamples
from nemo_minitron.data.prepare import PreparedData, prepare
from nemo_minitron.data.source import resolve_kind
from nemo_minitron.data.tokenizer import check_tokenizer, load_tokenizer
from nemo_minitron.stages.context import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeData:
    """The recipe's data under one tokenizer: one source, or several with weights."""

    sources: list[PreparedData]
    weights: list[float] | None
    packing: str = "none"

    @property
    def digest(self) -> str:
        """Identifies text, split, tokenizer, weights and packing."""
        digest = self.sources[0].digest if self.weights is None else digest_json(
            [[source.digest, weight] for source, weight in zip(self.sources, self.weights, strict=True)])
        return digest if self.packing == "none" else digest_json([digest, self.packing])

    @property
    def num_heldout_bytes(self) -> int | None:
        """UTF-8 size of all held-out text; None where of a source only tokens are known."""
        sizes = [source.num_heldout_bytes for source in self.sources]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def prepared_data(context: Context, tokenizer_directory: Path, arch: ArchSpec) -> RecipeData:
    """Token files of the recipe's data under this tokenizer; every rank must call this.

    Raises:
        ConfigError: samples longer than the model's context.
        DataError: text or a tokenizer that cannot be used, found on rank 0 first.
    """
    data = context.config.data
    context.check_seq_length(arch)
    check_tokenizer(load_tokenizer(tokenizer_directory), arch.vocab_size)

    def find_or_make_source(path: str | None) -> PreparedData:
        return prepare(
            kind=resolve_kind(data.kind, path), directory=context.data_dir,
            tokenizer_directory=tokenizer_directory, path=None if path is None else Path(path),
            separator=data.separator, json_key=data.json_key,
            num_heldout=data.num_heldout, heldout_fraction=data.heldout_fraction,
            calibration_fraction=data.calibration_fraction,
            chat_template=None if data.chat_template is None else Path(data.chat_template),
        )

    def find_or_make() -> RecipeData:
        if not data.blend:
            return RecipeData(sources=[find_or_make_source(data.path)], weights=None, packing=data.packing)
        return RecipeData(sources=[find_or_make_source(source.path) for source in data.blend],
                          weights=[source.weight for source in data.blend], packing=data.packing)

    made = find_or_make() if context.rank == 0 else None
    context.barrier()
    return made or find_or_make()


def split_samples(context: Context, prepared: RecipeData, split: str, arch: ArchSpec, *,
                  seq_length: int | None = None) -> Samples:
    """Samples of "train", "calibration" or "heldout", of `data.seq_length` tokens or another length."""
    length = seq_length or context.config.data.seq_length
    sources = [_source_samples(context, source, split, prepared.packing, arch, length) for source in prepared.sources]
    return sources[0] if prepared.weights is None else BlendedSamples(sources, prepared.weights)


def _source_samples(context: Context, source: PreparedData, split: str, packing: str, arch: ArchSpec,
                    seq_length: int) -> Samples:
    tokens = source.open(split)
    if packing == "none" and not source.chat:
        return TokenSamples(tokens, seq_length, vocab_size=arch.vocab_size)
    samples = DocumentSamples(tokens, seq_length, packed=packing == "documents", vocab_size=arch.vocab_size,
                              answers=source.open_answers(split) if source.chat else None)
    if source.chat:
        context.say(f"[data] {split}: {samples.num_evaluation_samples:,} samples, {samples.fill:.0%} full; "
                    f"{samples.num_truncated:,} conversations cut off after {seq_length} tokens, "
                    f"{samples.num_dropped:,} without an answer in them left out")
    return samples
