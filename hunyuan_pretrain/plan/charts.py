"""Elements of an HTML page: text that is escaped, tables, and charts as inline SVG.

Drawings hold no words: they stretch to the width of the page, and the words beside them keep their size on a phone. A
colour is the name of a variable of the page's style sheet. What a shape stands for is its title, shown under a pointer.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hunyuan_pretrain.plan.pipeline import Slot

WIDTH = 1000.0
HEIGHT = 20
"""Of a drawing, in its own units."""
NARROWEST = 8.0
"""Passes that are narrower are drawn without a gap between them, which would hide them."""


class Html(str):
    """Markup. Every other string is text."""

    __slots__ = ()


def join(parts: Iterable[str]) -> Html:
    """Markup as it is, and text escaped."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def element(name: str, *children: str, **attributes: str | float) -> Html:
    """An element with its children. `class_` is the attribute class, `a_b` is a-b."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value if isinstance(value, str) else f"{value:.6g}")}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def number(value: float, text: str) -> Html:
    """A number as people read it; `value` is kept exactly, for programs."""
    return element("data", text, value=repr(value))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table whose rows begin with their name."""
    head = element("tr", *(element("th", text, scope="col") for text in heads))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    # a table wider than a phone scrolls, by keyboard too
    return element(
        "div", element("table", element("thead", head), element("tbody", *body)), class_="numbers", tabindex=0
    )


# --- charts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A part of a bar."""

    title: str
    size: float
    colour: str


def legend(colours: Iterable[tuple[str, str]]) -> Html:
    """What the colours of a chart mean: (name, colour)."""
    keys = (element("li", element("i", style=f"background:var(--{colour})"), name) for name, colour in colours)
    return element("ul", *keys, class_="legend")


def row(name: str, drawing: Html, value: str, class_: str = "row") -> Html:
    """A line of a chart."""
    return element("div", element("span", name), drawing, element("span", value), class_=class_)


def bar(pieces: Iterable[Piece], whole: float, mark: Piece | None = None) -> Html:
    """Pieces one after another on a scale from 0 to `whole`, and a line at `mark`."""
    shapes, start = [], 0.0
    for piece in pieces:
        shapes.append(_block(start, piece.size, whole, piece))
        start += piece.size
    if mark is not None:
        shapes.append(_line(mark.size / whole * WIDTH, mark))
    return _drawing(shapes)


def timeline(slots: Sequence[Slot], start: float, seconds: float, colours: dict[str, str]) -> Html:
    """When a pipeline rank computes, in the `seconds` from `start`: passes by kind, later model chunks paler."""
    chunks = 1 + max(slot.what.chunk for slot in slots)
    gap = {"class_": "gap"} if shortest(slots) / seconds * WIDTH >= NARROWEST else {}
    shapes = []
    for kind, colour in colours.items():
        for chunk in range(chunks):
            mine = [slot for slot in slots if (slot.what.kind, slot.what.chunk) == (kind, chunk)]
            where = f" of model chunk {chunk}" if chunks > 1 else ""
            title = f"{len(mine)} {kind} passes{where}, {mine[0].end - mine[0].start:.3g} s each"
            shapes.append(
                element(
                    "path",
                    element("title", title),
                    d="".join(_path(mine, start, seconds)),
                    style=f"fill:var(--{colour})",
                    fill_opacity=1 - 0.6 * chunk / chunks,
                    **gap,
                )
            )
    return _drawing(shapes)


def shortest(slots: Iterable[Slot]) -> float:
    """Seconds of the shortest pass."""
    return min(slot.end - slot.start for slot in slots)


def _path(slots: Iterable[Slot], start: float, seconds: float) -> Iterator[str]:
    """One shape for all passes of a kind: there may be thousands."""
    for slot in slots:
        left, right = (min(max((at - start) / seconds, 0.0), 1.0) * WIDTH for at in (slot.start, slot.end))
        if right > left:
            yield f"M{left:.2f} 0H{right:.2f}V{HEIGHT}H{left:.2f}z"


def _block(start: float, size: float, whole: float, piece: Piece) -> Html:
    return element(
        "rect",
        element("title", piece.title),
        x=start / whole * WIDTH,
        width=size / whole * WIDTH,
        height=HEIGHT,
        style=f"fill:var(--{piece.colour})",
    )


def _line(x: float, piece: Piece) -> Html:
    return element(
        "path",
        element("title", piece.title),
        d=f"M{x:.2f} -{HEIGHT}V{2 * HEIGHT}",
        class_="mark",
        style=f"stroke:var(--{piece.colour})",
    )


def _drawing(shapes: Iterable[Html]) -> Html:
    box = f"0 0 {WIDTH:.0f} {HEIGHT}"
    return element("svg", *shapes, viewBox=box, preserveAspectRatio="none", aria_hidden="true")
