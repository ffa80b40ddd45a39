"""`minitron scores show PATH` and `minitron scores diff A B`: what is in score files, as text. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nemo_minitron.errors import ConfigError, ScoresError
from nemo_minitron.importance.aggregate import Array, Ranking, importance
from nemo_minitron.importance.scores import BLOCK_INFLUENCE, HEADER_FILE, STATIC_METHODS, WIDTH_AXES, Scores
from nemo_minitron.report.rank import spearman, top_half_overlap

BARS = "▁▂▃▄▅▆▇█"
COLUMNS = 32
OPTIONS = tuple(field.name for field in dataclasses.fields(Ranking))


def show(arguments: list[str]) -> None:
    """Print what was measured: every width axis layer by layer, then what is known of the layers.

    `arguments`: a folder of scores or of a run, and `Ranking`'s choices as key=value.

    Raises:
        ConfigError, ScoresError: bad arguments, or scores that cannot be read.
    """
    (path,), (how, _) = _arguments(arguments, count=1)
    scores = _load(path)
    arch = scores.source
    print(f"{arch.family}: {arch.num_layers} layers, hidden {arch.hidden_size}, FFN {arch.ffn_hidden_size}, "
          f"{arch.num_attention_heads} heads in {arch.num_query_groups} groups")
    print(f"{scores.num_samples} calibration samples {scores.samples_digest[:12]}, weights {scores.source_digest[:12]}")
    print(f"{how.method}, batch {how.batch}, sequence {how.sequence}, norms {' '.join(how.norms)}, {how.ranking}")
    for axis in WIDTH_AXES:
        if not _has(scores, axis, how):
            continue
        print(f"\n{axis}: {scores.measures.get(axis, '')}")
        print(f"{'layer':>7}{'least':>11}{'median':>11}{'most':>11}{'top half':>10}  least to most important")
        for name, values in _rows(scores, axis, how):
            total = float(values.sum())
            share = float(np.sort(values)[::-1][: max(1, len(values) // 2)].sum()) / total if total else float("nan")
            print(f"{name:>7}{values.min():>11.4g}{np.median(values):>11.4g}{values.max():>11.4g}{share:>10.1%}"
                  f"  {sparkline(np.sort(values))}")
    for title, values, low in _depth(scores):
        print(f"\n{title}")
        for layer, value in enumerate(values):
            print(f"{layer:>7}{value:>11.4f}  {bar(value, low, float(values.max()))}")


def diff(arguments: list[str]) -> None:
    """Print how far two scores of one architecture rank alike: Spearman's correlation and the overlap of the top half.

    `arguments`: two folders, and `Ranking`'s choices for both, or as a.KEY=... and b.KEY=... for one.

    Raises:
        ConfigError, ScoresError: bad arguments, or scores that cannot be read or compared.
    """
    paths, hows = _arguments(arguments, count=2)
    first, second = (_load(path) for path in paths)
    differing = [name for name, value in first.source.to_dict().items() if second.source.to_dict()[name] != value]
    if differing:
        raise ScoresError("scores of different architectures cannot be compared",
                          expected=", ".join(f"{name} {getattr(first.source, name)}" for name in differing),
                          found=", ".join(f"{name} {getattr(second.source, name)}" for name in differing))
    for what, a, b in (("weights", first.source_digest, second.source_digest),
                       ("calibration samples", first.samples_digest, second.samples_digest)):
        print(f"{what}: {'the same' if a == b else f'{a[:12]} and {b[:12]}'}")
    compared = 0
    for axis in WIDTH_AXES:
        if not (_has(first, axis, hows[0]) and _has(second, axis, hows[1])):
            continue
        compared += 1
        print(f"\n{axis}\n{'layer':>7}{'rank corr.':>12}{'top half':>10}")
        found = []
        for (name, one), (_, other) in zip(_rows(first, axis, hows[0]), _rows(second, axis, hows[1]), strict=True):
            found.append((spearman(one, other), top_half_overlap(one, other)))
            _print_agreement(name, *found[-1])
        known = [correlation for correlation, _ in found if correlation is not None]
        if len(found) > 1:
            _print_agreement("mean", sum(known) / len(known) if known else None,
                             sum(overlap for _, overlap in found) / len(found))
    for name in sorted(first.tensors.keys() & second.tensors.keys()):
        if name.startswith("layers.") and not name.endswith(".0"):
            compared += 1
            one, other = first.tensors[name], second.tensors[name]
            print(f"\n{name}")
            _print_agreement("", spearman(one, other), top_half_overlap(one, other))
    if not compared:
        raise ScoresError("nothing to compare", expected="an axis that both scores hold", found="none")


def _print_agreement(name: str, correlation: float | None, overlap: float) -> None:
    print(f"{name:>7}{'n/a' if correlation is None else f'{correlation:.3f}':>12}{overlap:>10.1%}")


def sparkline(values: Array) -> str:
    """At most `COLUMNS` characters whose heights are the values, from zero to the largest."""
    columns = [float(part.mean()) for part in np.array_split(values, min(COLUMNS, len(values)))]
    top = max(columns)
    return "".join(BARS[min(7, int(8 * value / top))] if top > 0 else BARS[0] for value in columns)


def bar(value: float, low: float, high: float) -> str:
    """A bar as long as `value` lies from `low` to `high`."""
    return "█" * round(COLUMNS * (value - low) / (high - low)) if high > low else ""


def _rows(scores: Scores, axis: str, how: Ranking) -> Iterator[tuple[str, Array]]:
    values = importance(scores, axis, how)
    if values.ndim == 1:
        yield "all", values
    else:
        yield from ((str(layer), row) for layer, row in enumerate(values))


def _has(scores: Scores, axis: str, how: Ranking) -> bool:
    if how.method in STATIC_METHODS:
        return f"{axis}.{how.method}" in scores.tensors
    channels = axis in ("heads", "groups") and f"head_channels.{how.sequence}.sum" in scores.tensors
    return channels or f"{axis}.{how.sequence}.sum" in scores.tensors


def _depth(scores: Scores) -> Iterator[tuple[str, Array, float]]:
    """Title, values by first layer, and where bars start, of all that was measured of layers."""
    if BLOCK_INFLUENCE in scores.tensors:
        yield "layers: block influence", scores.tensors[BLOCK_INFLUENCE], 0.0
    for name, values in scores.tensors.items():
        kind, _, length = name.removeprefix("layers.").partition(".")
        if not name.startswith("layers.") or name == BLOCK_INFLUENCE or length == "0":
            continue
        what = f"without {length} layers from this one on" if length.isdigit() and length != "1" else "without it"
        if kind == "loss":
            whole = float(scores.tensors["layers.loss.0"][0])
            yield (f"layers: loss {what}, nats/token above the whole model's {whole:.4f} (perplexity "
                   f"{np.exp(whole):.2f})"), values - whole, 0.0
        elif kind == "accuracy":
            whole = float(scores.tensors["layers.accuracy.0"][0])
            yield f"layers: accuracy {what}; the whole model's is {whole:.4f}", values, 0.0
        elif length == "removal_order":
            yield "layers: order in which they go by logit_mse", values, -1.0
        else:
            yield f"layers: {kind} {what if length else ''}".rstrip(), values, 0.0


def _arguments(arguments: list[str], *, count: int) -> tuple[list[Path], tuple[Ranking, Ranking]]:
    paths = [Path(argument) for argument in arguments if "=" not in argument]
    if len(paths) != count:
        raise ConfigError("wrong number of folders", found=str(len(paths)),
                          expected=f"{count} with {HEADER_FILE}, then key=value of {', '.join(OPTIONS)}")
    chosen: list[dict[str, object]] = [{}, {}]
    for argument in (argument for argument in arguments if "=" in argument):
        key, value = argument.split("=", 1)
        side, _, name = key.rpartition(".")
        if name not in OPTIONS or side not in ("", "a", "b"):
            raise ConfigError("unknown option", expected=", ".join(OPTIONS), found=repr(key), key=key)
        for number in (0, 1) if not side else ("ab".index(side),):
            chosen[number][name] = tuple(value.strip("[]").split(",")) if name == "norms" else value
    first, second = (dataclasses.replace(Ranking(), **choice).check() for choice in chosen)  # type: ignore[arg-type]
    return paths, (first, second)


def _load(path: Path) -> Scores:
    inside = path / "round1" / "score"
    return Scores.load(inside if not (path / HEADER_FILE).is_file() and inside.is_dir() else path)
