"""The tables of the page: losses, architectures, times, versions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from nemo_minitron.arch import ArchSpec
from nemo_minitron.report import formats
from nemo_minitron.report.collect import Experiment, ModelFigures, Round
from nemo_minitron.report.markup import Html, join, tag

MODEL_NAMES = {"teacher": "teacher", "pruned": "pruned", "distilled": "distilled", "ce": "CE control",
               "scratch": "from scratch", "scratch_until": "scratch, longer", "aligned": "aligned"}
MODEL_OF_STAGE = {"distill": "distilled", "ce": "ce", "scratch": "scratch", "scratch_until": "scratch_until",
                  "align": "aligned"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A table row: `cells` right-aligned; with `words` one left-aligned remark instead of cells."""

    name: str
    cells: Sequence[str] = ()
    words: Html | None = None
    class_: str | None = None


def table(headers: Sequence[tuple[str, str]], rows: Sequence[Row], *, caption: str = "") -> Html:
    """A table whose first column names the rows; `headers` are (name, unit) of all columns."""
    head = tag("tr", *[tag("th", name, tag("span", unit, class_="unit") if unit else "", scope="col")
                       for name, unit in headers])
    body = [
        tag("tr", tag("th", row.name, scope="row"),
            *([tag("td", row.words, class_="words", colspan=len(headers) - 1)] if row.words is not None
              else [tag("td", cell) for cell in row.cells]), class_=row.class_)
        for row in rows
    ]
    return join([tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll"),
                 tag("p", caption, class_="caption") if caption else ""])


def loss_table(round_: Round, experiment: Experiment) -> Html:
    """Every model of the round on the same held-out tokens; a control that was not run says what adds it."""
    teacher = round_.models.get("teacher")
    bits = experiment.heldout_tokens and experiment.heldout_bytes
    headers = [("model", ""), ("loss", "nats/token"), ("excess", "nats/token"), ("perplexity", "per token"),
               *([("bits", "per byte")] if bits else []), ("parameters", "all"), ("parameters", "non-embedding"),
               ("trained on", "tokens"), ("training", "wall clock"), ("speed", "tokens/s")]
    rows = []
    for key, name in MODEL_NAMES.items():
        model = round_.models.get(key)
        if model is None and key in ("scratch_until", "aligned"):
            continue
        if model is None:
            words = join(["not run; ", tag("code", "make controls"), " adds it"]) if key in ("ce", "scratch") \
                else Html("not measured yet")
            rows.append(Row(name, words=words))
        else:
            rows.append(Row(name, _loss_cells(model, key, teacher, experiment),
                            class_="strong" if key == "distilled" else None))
    tokens = experiment.heldout_tokens
    same = "All losses are on the same held-out tokens." if tokens is None else \
        f"All losses are on the same {formats.integer(tokens)} held-out tokens."
    caption = (f"{same} Excess is the loss above the teacher's. The CE control is the same pruned model trained "
               "with plain cross-entropy instead of distillation; from scratch is the same architecture with "
               "random initial weights.")
    if "aligned" in round_.models:
        caption += " The aligned model was tuned on conversations: its loss on this text is not what it was tuned for."
    return table(headers, rows, caption=caption)


def answers_table(round_: Round) -> Html:
    """Loss of every model on the held-out answers of each training of the alignment, in the order of training."""
    headers = [("model", ""), *[(phase, "nats/token") for phase in round_.answers]]
    rows = [Row(name, [formats.loss(losses.get(key)) for losses in round_.answers.values()],
                class_="strong" if key == "aligned" else None)
            for key, name in MODEL_NAMES.items() if any(key in losses for losses in round_.answers.values())]
    return table(headers, rows, caption="Cross-entropy of held-out answers, over the answers' tokens; each column is a "
                                        "training of the alignment, in their order, with its own conversations.")


def architecture_table(source: ArchSpec, target: ArchSpec) -> Html:
    """Sizes before and after, with the change."""
    sizes = [
        ("layers", "num_layers"), ("hidden size", "hidden_size"), ("FFN size", "ffn_hidden_size"),
        ("attention heads", "num_attention_heads"), ("query groups", "num_query_groups"), ("head dim", "head_dim"),
        ("vocabulary", "vocab_size"),
    ]
    rows = [_change(name, getattr(source, field), getattr(target, field)) for name, field in sizes]
    rows += [
        _change("parameters", source.num_parameters(), target.num_parameters(), "strong"),
        _change("non-embedding", source.num_non_embedding_parameters(), target.num_non_embedding_parameters(),
                "strong"),
    ]
    return table([("", ""), ("before", "teacher"), ("after", "pruned"), ("change", "")], rows,
                 caption="Non-embedding counts all but the input and output embedding matrices"
                         + ("; the two are tied here and count once." if target.tied_embeddings else "."))


def time_table(round_: Round) -> Html:
    """One row per finished stage: wall-clock seconds, processes and their layout, speed."""
    total = sum(_seconds(round_, stage) or 0.0 for stage in round_.manifests)
    rows = []
    for stage, manifest in round_.manifests.items():
        world, seconds = manifest.world, _seconds(round_, stage)
        model = round_.models.get(MODEL_OF_STAGE.get(stage, ""))
        speed = _float(manifest.result.get("tokens_per_s")) or (model.tokens_per_s if model else None)
        rows.append(Row(stage, [
            formats.duration(seconds),
            formats.percent(seconds / total if seconds is not None and total else None, 0),
            _count(world.get("world_size")), _layout(world), _count(world.get("threads")), formats.integer(speed),
            formats.moment(_float(manifest.times.get("started"))),
        ]))
    rows.append(Row("total", [formats.duration(total), "", "", "", "", "", ""], class_="total"))
    return table([("stage", ""), ("time", "wall clock"), ("share", ""), ("processes", ""),
                  ("TP \u00d7 PP \u00d7 DP", "degrees"), ("threads", "per process"), ("speed", "tokens/s"),
                  ("started", "")], rows)


def version_table(experiment: Experiment) -> Html | None:
    """Every package version that any stage recorded; several where stages differ."""
    found: dict[str, list[str]] = {}
    for round_ in experiment.rounds:
        for manifest in round_.manifests.values():
            for package, version in manifest.versions.items():
                seen = found.setdefault(str(package), [])
                if str(version) not in seen:
                    seen.append(str(version))
    rows = [Row(package, [", ".join(versions)]) for package, versions in sorted(found.items())]
    return table([("package", ""), ("version", "")], rows) if rows else None


def total_seconds(experiment: Experiment) -> float | None:
    """Wall-clock seconds of all finished stages of all rounds; None where nothing was recorded."""
    found = [seconds for round_ in experiment.rounds for stage in round_.manifests
             if (seconds := _seconds(round_, stage)) is not None]
    return sum(found) if found else None


def last_finished(experiment: Experiment) -> float | None:
    """When the latest stage ended, in unix seconds; None where nothing was recorded."""
    ends = [started + (_float(manifest.times.get("seconds")) or 0.0) for round_ in experiment.rounds
            for manifest in round_.manifests.values()
            if (started := _float(manifest.times.get("started"))) is not None]
    return max(ends, default=None)


def _loss_cells(model: ModelFigures, key: str, teacher: ModelFigures | None, experiment: Experiment) -> list[str]:
    excess = None
    if key != "teacher" and teacher is not None and teacher.loss is not None and model.loss is not None:
        excess = model.loss - teacher.loss
    cells = [formats.loss(model.loss), formats.signed(excess), formats.perplexity(model.loss)]
    if experiment.heldout_tokens and experiment.heldout_bytes:
        per_byte = None if model.loss is None else \
            model.loss * experiment.heldout_tokens / experiment.heldout_bytes / math.log(2)
        cells.append(formats.loss(per_byte))
    return [*cells, formats.count(model.num_parameters), formats.count(model.num_non_embedding_parameters),
            formats.count(model.tokens), formats.duration(model.seconds), formats.integer(model.tokens_per_s)]


def _change(name: str, before: int, after: int, class_: str | None = None) -> Row:
    change = "same" if before == after else formats.percent(after / before - 1)
    return Row(name, [formats.integer(before), formats.integer(after), change], class_=class_)


def _seconds(round_: Round, stage: str) -> float | None:
    return _float(round_.manifests[stage].times.get("seconds"))


def _layout(world: dict[str, Any]) -> str:
    """The degrees, unless rank 0 ran the stage alone: then they do not apply."""
    degrees = [_float(world.get(degree)) for degree in ("tp", "pp", "dp")]
    known = [degree for degree in degrees if degree is not None]
    if len(known) < len(degrees) or math.prod(known) != _float(world.get("world_size")):
        return formats.MISSING
    return " \u00d7 ".join(formats.integer(degree) for degree in known)


def _count(value: Any) -> str:
    return formats.integer(_float(value))


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
