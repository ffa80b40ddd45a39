"""Our own inline SVG charts: they need no JavaScript, take their colours from the page and print.

Every chart is drawn twice, wide and narrow, and the page shows the one that fits the screen, so that text keeps its
size on a phone. `tone` names a colour class of `style`; tooltips are SVG titles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from nemo_minitron.report import formats
from nemo_minitron.report.markup import Html, join, tag
from nemo_minitron.report.scales import Scale, linear_ticks, padded, spread

GAP = 15.0
"""Pixels between two direct labels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """An SVG canvas with its margins, in pixels."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    narrow: bool = False

    @property
    def x_end(self) -> float:
        """Right edge of the plot area."""
        return self.width - self.right

    @property
    def y_end(self) -> float:
        """Bottom edge of the plot area."""
        return self.height - self.bottom


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One curve. `label` is written at its end; `marker` adds a shape per point with a tooltip."""

    xs: Sequence[float]
    ys: Sequence[float]
    tone: str
    label: str = ""
    marker: str = ""
    faint: bool = False
    tooltip: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A dashed line across the plot at a value of y."""

    y: float
    label: str
    tone: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """A vertical line at x; what lies left of it is shaded as kept."""

    x: float
    label: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strip:
    """One layer's channels: `relative` is each channel's importance over the layer's mean, descending.

    `kept` is the kept share of channels and `kept_mass` their share of the layer's importance; both are None for
    a layer that was cut as a whole, and `kept` is 1 where nothing was cut.
    """

    label: str
    relative: Sequence[float]
    kept: float | None
    kept_mass: float | None


def line_chart(series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_y: bool = False,
               references: Sequence[Reference] = (), cut: Cut | None = None, y_max: float | None = None,
               y_min: float | None = None, format_y: Callable[[float], str] = formats.loss) -> Html:
    """Curves over a linear x from 0, with linear or logarithmic y.

    Values that are not finite are left out, and with `log_y` those that are not positive. Curves are clipped above
    `y_max`; points above it are not shown. The axis begins at `y_min` at the latest.
    """
    kept = [dataclasses.replace(one, xs=[x for x, _ in pairs], ys=[y for _, y in pairs])
            for one in series if (pairs := _plottable(one, log_y))]
    ys = [y for one in kept for y in one.ys] + [line.y for line in references]
    if not kept:
        return tag("p", "Nothing to plot yet.", class_="missing")
    low = min(ys) if y_min is None else min(y_min, *ys)
    high = max(ys) if y_max is None else min(y_max, max(ys))
    if log_y:
        low, high = (low / 1.15, high * 1.15) if low < high else (low / 2, high * 2)
    else:
        low, high = padded(low, max(low, high))
    x_high = max(max(one.xs) for one in kept) or 1.0

    def draw(frame: Frame) -> Html:
        x_scale = Scale(low=0, high=x_high, start=frame.left, end=frame.x_end)
        y_scale = Scale(low=low, high=high, start=frame.y_end, end=frame.top, log=log_y)
        plot = [_cut(cut, x_scale, frame)] if cut else []
        plot += [tag("line", x1=frame.left, x2=frame.x_end, y1=y_scale(line.y), y2=y_scale(line.y),
                     class_=f"reference {line.tone}") for line in references]
        plot += [_curve(one, x_scale, y_scale) for one in kept]
        return join([
            _y_axis(y_scale, frame, y_label + (" (log scale)" if log_y else "")),
            _x_axis(x_scale, frame, x_label, formats.short_count),
            tag("svg", *plot, x=frame.left, y=frame.top, width=frame.x_end - frame.left,
                height=frame.y_end - frame.top,
                viewBox=f"{frame.left:g} {frame.top:g} {frame.x_end - frame.left:g} {frame.y_end - frame.top:g}"),
            *[_marked_points(one, x_scale, y_scale, x_label, y_label, format_y) for one in kept if one.marker],
            _cut_label(cut, x_scale, frame) if cut else "",
            _end_labels(kept, references, y_scale, frame),
        ])

    labelled = bool(references) or any(one.label for one in kept)
    return _responsive(draw, title, wide_height=340, narrow_height=280, wide_right=86 if labelled else 16,
                       narrow_right=74 if labelled else 14)


def dot_plot(rows: Sequence[tuple[str, float, str]], *, title: str, x_label: str) -> Html:
    """One row per (name, value, tone): a dot on a shared axis, with a vertical line at the first row's value."""
    low, high = padded(min(value for _, value, _ in rows), max(value for _, value, _ in rows), 0.08)

    def draw(frame: Frame) -> Html:
        x_scale = Scale(low=low, high=high, start=frame.left, end=frame.x_end)
        step = (frame.y_end - frame.top) / len(rows)
        origin = x_scale(rows[0][1])
        parts: list[str] = [_x_axis(x_scale, frame, x_label, _short, grid=True),
                            tag("line", x1=origin, x2=origin, y1=frame.top, y2=frame.y_end,
                                class_=f"reference {rows[0][2]}")]
        for index, (name, value, tone) in enumerate(rows):
            x, y = x_scale(value), frame.top + (index + 0.5) * step
            parts += [
                tag("text", name, x=frame.left - 12, y=y, class_="end middle strong"),
                tag("line", x1=origin, x2=x, y1=y, y2=y, class_=f"stem {tone}"),
                tag("circle", cx=x, cy=y, r=5.5, class_=f"mark {tone}"),
                tag("text", formats.loss(value), x=x + 11, y=y, class_="value middle"),
            ]
        return join(parts)

    height, name = 32 * len(rows) + 50, 8 * max(len(name) for name, _, _ in rows) + 18  # a letter is about 8 wide
    return _responsive(draw, title, wide_height=height, narrow_height=height, wide_left=max(116, name),
                       narrow_left=max(100, name), wide_right=52, narrow_right=52, top=6)


def bar_chart(values: Sequence[float], kept: Sequence[bool], *, title: str, x_label: str, y_label: str) -> Html:
    """One bar per index; those that are not kept are hollow."""
    low, high = min(0.0, *values), max(0.0, *values)
    high = high * 1.08 if high > low else low + 1.0

    def draw(frame: Frame) -> Html:
        y_scale = Scale(low=low, high=high, start=frame.y_end, end=frame.top)
        band = (frame.x_end - frame.left) / len(values)
        every = math.ceil(len(values) * 22 / (frame.x_end - frame.left))
        parts: list[str] = [_y_axis(y_scale, frame, y_label), _x_title(frame, x_label)]
        for index, (value, keep) in enumerate(zip(values, kept, strict=True)):
            x, width = frame.left + index * band + band * 0.15, band * 0.7
            top, bottom = y_scale(max(value, 0.0)), y_scale(min(value, 0.0))
            state = "kept" if keep else "cut"
            parts.append(tag("rect", tag("title", f"layer {index}, {state}: {value:.4g}"), x=x, y=top, width=width,
                             height=max(bottom - top, 1.0), rx=min(2.0, width / 4), class_=f"bar {state}"))
            if index % every == 0:
                parts.append(tag("text", str(index), x=x + width / 2, y=frame.y_end + 17, class_="tick centre"))
        parts.append(tag("line", x1=frame.left, x2=frame.x_end, y1=y_scale(0), y2=y_scale(0), class_="axis"))
        return join(parts)

    return _responsive(draw, title, wide_height=250, narrow_height=220)


def heat_strips(strips: Sequence[Strip], *, levels: Sequence[float], title: str, x_label: str) -> Html:
    """One strip per layer, its channels sorted by importance; darker where it exceeds more of `levels` (descending).

    A mark stands at the kept share of channels, and the share of importance it covers is written beside it where
    there is room.
    """
    row = min(22.0, max(5.0, 440 / len(strips)))

    def draw(frame: Frame) -> Html:
        x_scale = Scale(low=0, high=1, start=frame.left, end=frame.x_end)
        every = math.ceil(13 / row)
        parts: list[str] = [
            _x_axis(x_scale, frame, x_label, lambda share: formats.percent(share, 0), grid=False),
            tag("text", "importance kept", x=frame.width, y=12, class_="tick end"),
            tag("text", "layer", x=frame.left - 8, y=12, class_="tick end"),
        ]
        for index, strip in enumerate(strips):
            y, height = frame.top + index * row, row - (3 if row > 9 else 1)
            parts.append(_strip(strip, levels, x_scale, y, height))
            if index % every == 0:
                note = "layer cut" if strip.kept_mass is None else formats.percent(strip.kept_mass, 0)
                parts += [
                    tag("text", strip.label, x=frame.left - 8, y=y + height / 2, class_="tick end middle"),
                    tag("text", note, x=frame.width, y=y + height / 2, class_="tick end middle"),
                ]
        return join(parts)

    height = 22 + row * len(strips) + 46
    return _responsive(draw, title, wide_height=height, narrow_height=height, wide_left=48, narrow_left=38,
                       wide_right=96, narrow_right=62, top=22)


def _responsive(draw: Callable[[Frame], Html], title: str, *, wide_height: float, narrow_height: float,
                wide_left: float = 62, narrow_left: float = 52, wide_right: float = 16, narrow_right: float = 12,
                top: float = 26) -> Html:
    frames = (
        Frame(width=860, height=wide_height, left=wide_left, right=wide_right, top=top, bottom=44),
        Frame(width=360, height=narrow_height, left=narrow_left, right=narrow_right, top=top, bottom=44, narrow=True),
    )
    return join(tag("svg", draw(frame), viewBox=f"0 0 {frame.width:g} {frame.height:g}", role="img",
                    aria_label=title, class_="chart " + ("narrow" if frame.narrow else "wide")) for frame in frames)


def _plottable(series: Series, log_y: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(series.xs, series.ys, strict=True)
            if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]


def _curve(series: Series, x_scale: Scale, y_scale: Scale) -> Html:
    points = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in zip(series.xs, series.ys, strict=True))
    return tag("polyline", points=points, class_=f"curve {series.tone}" + (" faint" if series.faint else ""))


def _marked_points(series: Series, x_scale: Scale, y_scale: Scale, x_label: str, y_label: str,
                   format_y: Callable[[float], str]) -> Html:
    return join(
        tag("g", tag("title", f"{series.tooltip or series.label}: {y_label} {format_y(y)} at {formats.count(x)} "
                              f"{x_label}"),
            marker_shape(series.marker, x_scale(x), y_scale(y)), class_=f"mark {series.tone}")
        for x, y in zip(series.xs, series.ys, strict=True) if y <= y_scale.high
    )


def marker_shape(shape: str, x: float, y: float) -> Html:
    """A square, diamond or circle around (x, y)."""
    if shape == "square":
        return tag("rect", x=x - 3.5, y=y - 3.5, width=7, height=7)
    if shape == "diamond":
        return tag("path", d=f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z")
    return tag("circle", cx=x, cy=y, r=4)


def _end_labels(series: Sequence[Series], references: Sequence[Reference], y_scale: Scale, frame: Frame) -> Html:
    labels = [(y_scale(one.ys[-1]), one.label, one.tone) for one in series if one.label]
    labels += [(y_scale(line.y), line.label, line.tone) for line in references]
    places = spread([y for y, _, _ in labels], gap=GAP, low=frame.top + 4, high=frame.y_end - 4)
    return join(tag("text", name, x=frame.x_end + 9, y=place, class_=f"label middle {tone}")
                for (_, name, tone), place in zip(labels, places, strict=True))


def _y_axis(scale: Scale, frame: Frame, label: str) -> Html:
    ticks = scale.ticks(5)
    decimals = 0 if scale.log else _decimals(ticks)
    parts = [tag("text", label, x=0, y=12, class_="tick")]
    for tick in ticks:
        y = scale(tick)
        written = (f"{tick:g}" if scale.log else f"{tick:.{decimals}f}").replace("-", formats.MINUS)
        parts += [tag("line", x1=frame.left, x2=frame.x_end, y1=y, y2=y, class_="grid"),
                  tag("text", written, x=frame.left - 8, y=y, class_="tick end middle")]
    return join(parts)


def _x_axis(scale: Scale, frame: Frame, label: str, format_x: Callable[[float], str], *, grid: bool = False) -> Html:
    parts = [_x_title(frame, label)]
    for tick in linear_ticks(scale.low, scale.high, 4 if frame.narrow else 7):
        x = scale(tick)
        parts += [tag("line", x1=x, x2=x, y1=frame.top if grid else frame.y_end, y2=frame.y_end + 5,
                      class_="grid" if grid else "axis"),
                  tag("text", format_x(tick), x=x, y=frame.y_end + 18, class_="tick centre")]
    return join([*parts, tag("line", x1=frame.left, x2=frame.x_end, y1=frame.y_end, y2=frame.y_end, class_="axis")])


def _x_title(frame: Frame, label: str) -> Html:
    return tag("text", label, x=(frame.left + frame.x_end) / 2, y=frame.height - 6, class_="tick centre")


def _cut(cut: Cut, x_scale: Scale, frame: Frame) -> Html:
    x = x_scale(cut.x)
    return join([
        tag("rect", x=frame.left, y=frame.top, width=x - frame.left, height=frame.y_end - frame.top,
            class_="kept-area"),
        tag("line", x1=x, x2=x, y1=frame.top, y2=frame.y_end, class_="cut-line"),
    ])


def _cut_label(cut: Cut, x_scale: Scale, frame: Frame) -> Html:
    x = x_scale(cut.x)
    left = x > (frame.left + frame.x_end) / 2
    return tag("text", cut.label, x=x + (-7 if left else 7), y=frame.top + 14,
               class_="label end" if left else "label")


def _strip(strip: Strip, levels: Sequence[float], x_scale: Scale, y: float, height: float) -> Html:
    """Segments from the darkest on: sorted values make each level one interval of channels."""
    num_channels, start = len(strip.relative), 0
    cells: list[str] = []
    for level, bound in enumerate([*levels, -math.inf]):
        end = sum(value >= bound for value in strip.relative)
        if end > start:
            x, x_end = x_scale(start / num_channels), x_scale(end / num_channels)
            cells.append(tag("rect", x=x, y=y, width=x_end - x, height=height, class_=f"heat-{level}"))
        start = end
    if strip.kept is not None and strip.kept < 1:
        x = x_scale(strip.kept)
        cells.append(tag("line", x1=x, x2=x, y1=y - 1, y2=y + height + 1, class_="cut-line"))
    tooltip = f"layer {strip.label}: cut" if strip.kept is None or strip.kept_mass is None else (
        f"layer {strip.label}: {formats.percent(strip.kept)} of the channels kept, "
        f"with {formats.percent(strip.kept_mass)} of the importance")
    return tag("g", tag("title", tooltip), *cells, class_="strip cut" if strip.kept is None else "strip")


def _decimals(ticks: Sequence[float]) -> int:
    """Decimals that tell neighbouring ticks apart."""
    if len(ticks) < 2:
        return 2
    return max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))


def _short(value: float) -> str:
    return f"{value:g}".replace("-", formats.MINUS)
