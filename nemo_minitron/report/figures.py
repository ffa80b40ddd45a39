"""The figures of the page: what to draw and how to read it. Drawing itself is in `charts`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_minitron.artifacts import Plan
from nemo_minitron.report import charts, formats
from nemo_minitron.report.collect import History, Importance, Round
from nemo_minitron.report.markup import Html, join, tag
from nemo_minitron.report.tables import MODEL_NAMES

RUNS = (("distill", "distilled", "circle"), ("ce", "ce", "square"), ("scratch", "scratch", "diamond"))
"""(stage, model, marker) of the runs that share one chart."""

SHORT_NAMES = MODEL_NAMES | {"ce": "CE only", "scratch": "scratch", "scratch_until": "scratch, longer"}
"""What fits at the end of a curve and beside a row."""

MAX_POINTS = 120
HEAT_LEVELS = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Importance of an FFN channel over its layer's mean."""


def loss_ladder(round_: Round) -> Html | None:
    """The held-out losses of all models on one axis, teacher first."""
    rows = [(name, round_.models[key].loss, key) for key, name in SHORT_NAMES.items() if key in round_.models]
    known = [(name, loss, key) for name, loss, key in rows if loss is not None and math.isfinite(loss)]
    if len(known) < 2 or known[0][2] != "teacher":
        return None
    return _figure(None, [], charts.dot_plot(known, title="Held-out loss of every model",
                                             x_label="held-out loss, nats/token"),
                   "The distance to the dashed line is the excess over the teacher.")


def loss_curves(round_: Round) -> list[Html]:
    """Cross-entropy of all runs over tokens, and KL to the teacher of the distillation."""
    histories = [(round_.histories[stage], model, marker) for stage, model, marker in RUNS if stage in round_.histories]
    figures = []
    if histories:
        teacher = round_.models.get("teacher")
        figures.append(_cross_entropy(histories, teacher.loss if teacher else None))
    if (longer := _scratch_until(round_)) is not None:
        figures.append(longer)
    distill = round_.histories.get("distill")
    if distill and any("kl" in line for line in distill.training):
        figures.append(_divergence(distill))
    return figures


def _scratch_until(round_: Round) -> Html | None:
    """Cross-entropy of random weights that are trained until they are as good as the distilled model."""
    history, distill = (round_.histories.get(stage) for stage in ("scratch_until", "distill"))
    if history is None:
        return None
    looks = [row["heldout_ce"] for row in distill.heldout if "heldout_ce" in row] if distill else []
    return _cross_entropy([(history, "scratch_until", "diamond")], looks[-1] if looks else None, of="distilled",
                          title="From scratch, on more tokens")


def correction_curve(round_: Round) -> Html | None:
    """Cross-entropy while the teacher was fine-tuned on this data before distillation."""
    history = round_.histories.get("correct")
    if history is None:
        return None
    return _cross_entropy([(history, "teacher", "circle")], None, title="Teacher correction")


def alignment_curve(round_: Round) -> Html | None:
    """Cross-entropy of answers while the student was fine-tuned on conversations."""
    history = round_.histories.get("align")
    if history is None:
        return None
    return _cross_entropy([(history, "aligned", "circle")], None, title="Alignment: cross-entropy of answers")


def layer_importance(importance: Importance, plan: Plan | None) -> Html | None:
    """Block influence per layer, kept layers filled."""
    if importance.layers is None:
        return None
    kept = [plan is None or index in plan.layers for index in range(len(importance.layers))]
    num_cut = kept.count(False)
    legend = [(_swatch("rect", "bar kept"), "kept"), (_swatch("rect", "bar cut"), "cut")] if num_cut else []
    said = f"Layers cut: {num_cut} of {len(kept)}."
    return _figure("Layers", legend, charts.bar_chart(
        importance.layers, kept, title="Block influence per layer", x_label="layer", y_label="block influence"),
        f"Block influence: one minus the mean cosine similarity of a layer's input and output. {said}")


def ffn_importance(importance: Importance, plan: Plan | None) -> Html | None:
    """Each layer's FFN channels sorted by importance, with the kept share marked."""
    if importance.ffn is None:
        return None
    strips = []
    for layer, values in enumerate(importance.ffn):
        total = math.fsum(values)
        mean = total / len(values) or 1.0
        relative = sorted((value / mean for value in values), reverse=True)
        share = mass = None
        if plan is None or layer in plan.layers:
            indices = range(len(values)) if plan is None else plan.ffn[plan.layers.index(layer)]
            share = len(indices) / len(values)
            mass = math.fsum(values[index] for index in indices) / total if total else share
        strips.append(charts.Strip(label=str(layer), relative=relative, kept=share, kept_mass=mass))
    bounds = [f"\u2265 {bound:g}\u00d7" for bound in HEAT_LEVELS] + [f"< {HEAT_LEVELS[-1]:g}\u00d7"]
    legend = [(_swatch("rect", f"heat-{level}"), bound) for level, bound in enumerate(bounds)]
    chart = charts.heat_strips(strips, levels=HEAT_LEVELS, title="FFN importance per layer",
                               x_label="share of the layer's channels, most important first")
    cut = any(strip.kept is not None and strip.kept < 1 for strip in strips)
    return _figure("FFN channels", legend, chart, (
        "Colour: a channel's importance over the mean of its layer. "
        + ("The red mark stands at the share of channels kept; " if cut else "No channel was cut; ")
        + "on the right, the share of the layer's importance in the kept channels."))


def hidden_importance(importance: Importance, plan: Plan | None) -> Html | None:
    """Hidden channels sorted by importance, with the cut."""
    if importance.hidden is None:
        return None
    values = sorted(importance.hidden, reverse=True)
    num_channels = len(values)
    ranks = sorted({round(index * (num_channels - 1) / 239) for index in range(240)}) if num_channels > 240 \
        else range(num_channels)
    mean = math.fsum(values) / num_channels or 1.0
    cut, said = None, "No hidden channel was cut."
    if plan is not None and len(plan.hidden) < num_channels:
        num_kept = len(plan.hidden)
        mass = math.fsum(importance.hidden[index] for index in plan.hidden) / (mean * num_channels)
        cut = charts.Cut(x=num_kept, label=f"{formats.integer(num_kept)} kept")
        said = (f"{formats.integer(num_kept)} of {formats.integer(num_channels)} channels are kept; they carry "
                f"{formats.percent(mass)} of the importance.")
    series = charts.Series(xs=[rank + 1 for rank in ranks], ys=[values[rank] / mean for rank in ranks],
                           tone="distilled")
    return _figure("Hidden channels", [], charts.line_chart(
        [series], title="Hidden importance, sorted", x_label="hidden channels, most important first",
        y_label="importance / mean", log_y=True, cut=cut), said)


def bucket_means(rows: Sequence[dict[str, float]], key: str) -> tuple[list[float], list[float], int]:
    """Mean of `key` over consecutive buckets of k steps, k such that at most `MAX_POINTS` remain.

    Returns mean tokens and mean value of each bucket (over its steps, equally weighted), and k.
    """
    having = [row for row in rows if math.isfinite(row.get(key, math.nan))]
    size = max(1, math.ceil(len(having) / MAX_POINTS))
    buckets = [having[start:start + size] for start in range(0, len(having), size)]
    return ([math.fsum(row["tokens"] for row in bucket) / len(bucket) for bucket in buckets],
            [math.fsum(row[key] for row in bucket) / len(bucket) for bucket in buckets], size)


def _cross_entropy(histories: Sequence[tuple[History, str, str]], level: float | None, *, of: str = "teacher",
                   title: str = "Cross-entropy") -> Html:
    """Curves over tokens, with a line at the loss `level` of the model `of`.

    The teacher's is of all held-out tokens, any other's of those that the points on the way cover.
    """
    series, legend, sizes = [], [], set()
    for history, model, marker in histories:
        key = "ce" if any("ce" in row for row in history.training) else "loss"
        xs, ys, size = bucket_means(history.training, key)
        sizes.add(size)
        name = MODEL_NAMES[model]
        heldout = [(row["tokens"], row["heldout_ce"]) for row in history.heldout if "heldout_ce" in row]
        label = SHORT_NAMES[model].rpartition(", ")[2]
        series.append(charts.Series(xs=xs, ys=ys, tone=model, faint=bool(heldout), label="" if heldout else label))
        if heldout:
            series.append(charts.Series(xs=[x for x, _ in heldout], ys=[y for _, y in heldout], tone=model,
                                        label=label, marker=marker, tooltip=f"{name}, held-out"))
            legend.append((_swatch("marked", model, marker), f"{name}, held-out"))
        if xs:
            legend.append((_swatch("faint" if heldout else "line", model), f"{name}, training"))
    references = []
    if level is not None and math.isfinite(level):
        references.append(charts.Reference(y=level, label=SHORT_NAMES[of], tone=of))
        legend.append((_swatch("dashed", of), f"{MODEL_NAMES[of]}, held-out"))
    y_max, clipped = _y_limit(series, [line.y for line in references])
    chart = charts.line_chart(series, title=title, x_label="training tokens", y_label="nats/token",
                              references=references, y_max=y_max)
    sampled = any(history.heldout for history, _, _ in histories)
    return _figure(title, legend, chart, _smoothing(sizes) + (
        f" The start, up to {formats.loss(clipped)}, is above the frame." if clipped is not None else "") + (
        " Held-out points on the way may cover part of the held-out tokens (train.eval_samples); the table"
        + (" and the teacher's line cover" if references and of == "teacher" else " covers")
        + " all of them." if sampled else ""))


def _divergence(history: History) -> Html:
    xs, ys, size = bucket_means(history.training, "kl")
    heldout = [(row["tokens"], row["heldout_kl"]) for row in history.heldout if "heldout_kl" in row]
    series = [charts.Series(xs=xs, ys=ys, tone="distilled", faint=bool(heldout), label="" if heldout else "training")]
    legend = [(_swatch("faint" if heldout else "line", "distilled"), "training")]
    if heldout:
        series.append(charts.Series(xs=[x for x, _ in heldout], ys=[y for _, y in heldout], tone="distilled",
                                    marker="circle", label="held-out", tooltip="held-out"))
        legend.insert(0, (_swatch("marked", "distilled", "circle"), "held-out"))
    positive = [y for one in series for y in one.ys if math.isfinite(y) and y > 0]
    log_y = bool(positive) and max(positive) > 4 * min(positive)
    chart = charts.line_chart(series, title="KL to the teacher", x_label="training tokens", y_label="nats/token",
                              log_y=log_y)
    _, agreement, _ = bucket_means(history.training, "agreement")
    said = f" At the end teacher and student agree on the most likely token for {formats.percent(agreement[-1])} " \
           "of the training tokens." if agreement else ""
    return _figure("KL(teacher \u2016 student) in distillation", legend, chart, _smoothing({size}) + said)


def _y_limit(series: Sequence[charts.Series], references: Sequence[float]) -> tuple[float | None, float | None]:
    """An upper end of y that lets what follows the first 15% of x fill the frame, and what is cut off, if anything."""
    points = [(x, y) for one in series for x, y in zip(one.xs, one.ys, strict=True) if math.isfinite(y)]
    x_high = max((x for x, _ in points), default=0.0)
    settled = [y for x, y in points if x >= 0.15 * x_high] + list(references)
    highest = max((y for _, y in points), default=0.0)
    if not settled or highest <= 1.25 * max(settled):
        return None, None
    return max(settled) * 1.03, highest


def _smoothing(sizes: set[int]) -> str:
    words = " or ".join(str(size) for size in sorted(sizes))
    return "Training values are single steps." if sizes <= {1} else \
        f"Training curves are means over {words} consecutive steps."


def _figure(title: str | None, legend: Sequence[tuple[Html, str]], chart: Html, caption: str) -> Html:
    items = [tag("li", swatch, label) for swatch, label in legend]
    return tag("figure", tag("h4", title) if title else "", tag("ul", *items, class_="legend") if items else "",
               chart, tag("figcaption", caption))


def _swatch(kind: str, tone: str, marker: str = "") -> Html:
    if kind == "rect":
        parts = [tag("rect", x=2, y=1, width=20, height=10, class_=tone)]
    else:
        classes = {"marked": "curve", "line": "curve", "faint": "curve faint", "dashed": "reference"}[kind]
        parts = [tag("line", x1=1, x2=25, y1=6, y2=6, class_=f"{classes} {tone}")]
    if marker:
        parts.append(tag("g", charts.marker_shape(marker, 13, 6), class_=f"mark {tone}"))
    return join([tag("svg", *parts, viewBox="0 0 26 12", aria_hidden="true")])
