"""Charts of a run: lines over steps, and heat maps by layer, as inline SVG (plan.charts says how such drawings work).

A line is the mean of each stretch of steps; the band around it reaches from the smallest to the largest value. zoom.js
draws them again for a range of steps, from the `data-` attributes, which is why it repeats some of this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from hunyuan_pretrain.plan.charts import WIDTH, Html, element, number
from hunyuan_pretrain.report.series import Series, Stretch

HEIGHT = 300.0
"""Of a chart, in its own units."""
COLOURS = ("blue", "orange", "green", "violet", "rose", "yellow", "sky", "navy", "grey")
"""Of lines, in order; more lines than these share them."""
SHOWN = 48
"""Columns of a chart that say their values under a pointer, at most."""


class Line(NamedTuple):
    """A number over steps."""

    name: str
    series: Series
    colour: str


class Level(NamedTuple):
    """A value to compare with, from one step to another, such as that of a plan."""

    title: str
    first: int
    last: int
    value: float


class Mark(NamedTuple):
    """Something that happened at a step."""

    title: str
    step: int
    colour: str


class Scale(NamedTuple):
    """From values to the height of a drawing."""

    low: float
    high: float
    is_log: bool

    @classmethod
    def of(cls, values: Iterable[float], may_be_log: bool) -> Scale:
        """Around all values; logarithmic if that is allowed and they differ by more than a factor of 30."""
        found = list(values)
        low, high = min(found), max(found)
        if may_be_log and low > 0 and high / low > 30:
            return cls(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)), True)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(0.0 if 0 <= low < 2 * (high - low) else low - room, high + room, False)

    def place(self, value: float) -> float:
        """0 at the bottom, 1 at the top."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.is_log else value
        return min(max((at - low) / (high - low), 0.0), 1.0)

    def ticks(self) -> list[float]:
        """A few round numbers."""
        if self.is_log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1, max(1, (last - first) // 4))]
        size = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step = next(size * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (size * factor) <= 5)
        first = math.ceil(self.low / step - 1e-9)
        return [step * count for count in range(first, math.floor(self.high / step + 1e-9) + 1)]


def chart(
    title: str,
    lines: Sequence[Line],
    last_step: int,
    *,
    unit: str = "",
    levels: Sequence[Level] = (),
    marks: Sequence[Mark] = (),
    may_be_log: bool = False,
    first_step: int = 1,
    is_wide: bool = False,
) -> Html:
    """Lines over the steps from `first_step` to `last_step`; empty if none has a value there."""
    seen = {line: [_rounded(one) for one in line.series if one.last >= first_step] for line in lines}
    values = [value for found in seen.values() for one in found for value in (one.low, one.high)]
    if not values:
        return Html()
    values += [level.value for level in levels if level.last >= first_step]
    across, scale = _Across(first_step, max(last_step, first_step + 1)), Scale.of(values, may_be_log)
    shapes = [_grid(scale), *(_vertical(mark, across) for mark in marks if mark.step >= first_step)]
    shapes += [_level(level, across, scale) for level in levels if level.last >= first_step]
    for line, found in seen.items():
        shapes += _line(line, found, across, scale)
    shapes.append(_values(seen, across, unit))
    drawing = element(
        "svg", *shapes, viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}", preserveAspectRatio="none", role="img",
        aria_label=title, data_first=str(across.first), data_last=str(across.last), data_unit=unit,
        data_log="yes" if may_be_log else "no",
    )  # fmt: skip
    ticks = [
        element("i", short(tick), style=f"bottom:{100 * scale.place(tick):.2f}%")
        for tick in scale.ticks()
        if 0 <= scale.place(tick) <= 1
    ]
    missing = sum(line.series.num_missing for line in lines)
    note = f"{missing:,} values are no finite numbers" if missing else ""
    return element(
        "figure",
        element("figcaption", element("b", title), f" {unit}" if unit else "", *_legend(lines, unit)),
        element("div", element("div", *ticks, class_="ticks"), drawing, class_="frame"),
        element("div", *(element("i", f"{step:,}") for step in across.ends), class_="ends steps"),
        *([element("p", note, class_="under")] if note else []),
        class_="plot wide" if is_wide else "plot",
    )


def _rounded(one: Stretch) -> Stretch:
    """To the six digits that the page keeps of each value, so that zoom.js draws from the same numbers."""
    low, mean, high = (float(f"{value:g}") for value in (one.low, one.mean, one.high))
    return Stretch(one.first, one.last, low, mean, high)


def _legend(lines: Sequence[Line], unit: str) -> Iterator[Html]:
    items = []
    for line in lines:
        if line.series.last is None:
            continue
        key = element("i", style=f"background:var(--{line.colour})")
        value = number(line.series.last, short(line.series.last))
        items.append(element("li", key, f"{line.name} " if line.name else "", value))
    yield element("ul", *items, class_="legend")


class _Across(NamedTuple):
    first: int
    last: int

    def place(self, step: float) -> float:
        return min(max((step - self.first) / (self.last - self.first), 0.0), 1.0) * WIDTH

    @property
    def ends(self) -> list[int]:
        return [self.first, (self.first + self.last) // 2, self.last]


def _grid(scale: Scale) -> Html:
    at = "".join(f"M0 {HEIGHT * (1 - scale.place(tick)):.1f}H{WIDTH:.0f}" for tick in scale.ticks())
    return element("path", d=at, class_="grid")


def _vertical(mark: Mark, across: _Across) -> Html:
    x = across.place(mark.step)
    return element(
        "path",
        element("title", mark.title),
        d=f"M{x:.1f} 0V{HEIGHT:.0f}",
        class_="at",
        data_step=str(mark.step),
        style=f"stroke:var(--{mark.colour})",
    )


def _level(level: Level, across: _Across, scale: Scale) -> Html:
    y = HEIGHT * (1 - scale.place(level.value))
    where = f"M{across.place(level.first):.1f} {y:.1f}H{across.place(level.last):.1f}"
    kept = f"{level.first} {level.last} {level.value!r}"
    return element("path", element("title", level.title), d=where, class_="planned", data_level=kept)


def _line(line: Line, found: Sequence[Stretch], across: _Across, scale: Scale) -> Iterator[Html]:
    if not found:
        return
    middles = [across.place((one.first + one.last) / 2) for one in found]
    means, lows, highs = (
        [HEIGHT * (1 - scale.place(value)) for value in values]
        for values in zip(*((one.mean, one.low, one.high) for one in found), strict=True)
    )
    if any(one.low < one.high for one in found):
        around = list(zip(middles, highs, strict=True)) + list(zip(middles, lows, strict=True))[::-1]
        yield element("path", d=f"{_through(around)}z", class_="band", style=f"fill:var(--{line.colour})")
    points = list(zip(middles, means, strict=True))
    if len(points) == 1:  # a line of no length is not drawn
        points.append((points[0][0] + 2, points[0][1]))
    style, kept = f"stroke:var(--{line.colour})", ";".join(_kept(found))
    yield element("path", d=_through(points), class_="line", style=style, data_name=line.name, data_values=kept)


def _kept(found: Iterable[Stretch]) -> Iterator[str]:
    """Of each point `FIRST LAST:MEAN LOW HIGH`. Without steps: as long as the point before, and as far from it as that
    from its own. Without low and high: they are the mean."""
    before, gap, more = 0, 1, 0
    for one in found:
        steps = one.first - before, one.last - one.first
        where = "" if steps == (gap, more) else f"{one.first} {one.last}:"
        around = "" if one.low == one.high else f" {one.low:g} {one.high:g}"
        yield f"{where}{one.mean:g}{around}"
        before, (gap, more) = one.first, steps


def _through(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _values(seen: dict[Line, list[Stretch]], across: _Across, unit: str) -> Html:
    """Columns that cannot be seen, and say their values under a pointer."""
    count = min(SHOWN, max(map(len, seen.values())))
    width = (across.last - across.first + 1) / count
    texts: dict[int, list[str]] = {}
    steps: dict[int, list[int]] = {}
    for line, found in seen.items():
        columns: dict[int, list[Stretch]] = {}
        for one in found:
            columns.setdefault(min(int(((one.first + one.last) / 2 - across.first) / width), count - 1), []).append(one)
        for column, stretches in columns.items():
            low, high = min(one.low for one in stretches), max(one.high for one in stretches)
            text = short(low) if low == high else f"{short(low)} to {short(high)}"
            texts.setdefault(column, []).append(f"{line.name or 'value'}: {text} {unit}".rstrip())
            steps.setdefault(column, []).extend(step for one in stretches for step in (one.first, one.last))
    shapes = []
    for column, of_lines in sorted(texts.items()):
        first, last = min(steps[column]), max(steps[column])
        where = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        title = element("title", "\n".join([where, *of_lines]))
        shapes.append(
            element("rect", title, x=column * WIDTH / count, width=WIDTH / count, height=HEIGHT, class_="look")
        )
    return element("g", *shapes, class_="columns")


# --- heat maps --------------------------------------------------------------------------------------------------------


class Shade(NamedTuple):
    """The colour of values below `below`."""

    below: float
    name: str
    colour: str
    opacity: float = 1.0


LOADS = (
    Shade(0.01, "dead: below 0.01", "red"),
    Shade(0.25, "to 0.25", "navy"),
    Shade(0.5, "to 0.5", "blue"),
    Shade(0.8, "to 0.8", "sky"),
    Shade(1.25, "0.8 to 1.25: even", "pale"),
    Shade(2.0, "to 2", "yellow"),
    Shade(4.0, "to 4", "orange"),
    Shade(math.inf, "above 4", "rose"),
)
"""Of an expert's load over an even share."""
SHARES = (
    Shade(1e-9, "0", "pale", 0.4),
    *(
        Shade(end, f"to {end:.0%}", "blue", 0.15 + 0.17 * place)
        for place, end in enumerate((0.01, 0.05, 0.1, 0.2, 0.5))
    ),
    Shade(math.inf, "above 50%", "blue"),
)
ENTROPIES = (
    Shade(0.05, "below 0.05", "red"),
    *(Shade(end, f"to {end:g}", "green", 0.15 + 0.17 * place) for place, end in enumerate((0.2, 0.4, 0.6, 0.8, 0.95))),
    Shade(math.inf, "above 0.95", "green"),
)


def heat_map(title: str, rows: Sequence[Sequence[float]], shades: Sequence[Shade], ends: tuple[str, str]) -> Html:
    """A map whose rows are the layers, layer 0 at the top. `ends`: what the first and the last column are."""
    width, cells = len(rows[0]), [""] * len(shades)
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            level = next((at for at, shade in enumerate(shades) if value < shade.below), len(shades) - 1)
            cells[level] += f"M{x} {y}h1v1h-1z"
    shapes = [
        element("path", d=path, style=f"fill:var(--{shade.colour})", fill_opacity=shade.opacity)
        for path, shade in zip(cells, shades, strict=True)
        if path
    ]
    box = f"0 0 {width} {len(rows)}"
    drawing = element("svg", *shapes, viewBox=box, preserveAspectRatio="none", role="img", shape_rendering="crispEdges")
    layers = [element("i", text) for text in ("layer 0", f"layer {len(rows) - 1}")]
    return element(
        "figure",
        element("figcaption", element("b", title)),
        element("div", element("div", *layers, class_="layers"), drawing, class_="frame"),
        element("div", *(element("i", text) for text in ends), class_="ends steps"),
        class_="plot heat",
    )


def shades_legend(shades: Sequence[Shade]) -> Html:
    """What the colours of a heat map mean."""
    keys = (
        element("li", element("i", style=f"background:var(--{one.colour});opacity:{one.opacity:g}"), one.name)
        for one in shades
    )
    return element("ul", *keys, class_="legend")


def short(value: float) -> str:
    """A number in few characters."""
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        for unit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= unit and size < 1e18:
                return f"{value / unit:.4g}{suffix}"
        return f"{value:.3g}"
    return f"{value:,.0f}" if size >= 1e4 else f"{value:.4g}"
