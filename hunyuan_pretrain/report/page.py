"""The page of `report`: how one or several runs went, as one HTML file that loads nothing, and runs only zoom.js."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hunyuan_pretrain.plan.charts import Html, element, join, legend, number, table
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.plan.page_file import PageFile
from hunyuan_pretrain.report import maps, tables
from hunyuan_pretrain.report.drawings import COLOURS, Level, Line, chart, short
from hunyuan_pretrain.report.groups import SECTIONS, Group, groups_of
from hunyuan_pretrain.report.page_style import STYLE
from hunyuan_pretrain.report.records import RunFiles
from hunyuan_pretrain.report.shown import MARKED, Shown, cell, swatch

PAGE = PageFile("report", "--out", "a report")
ZOOM = Path(__file__).with_name("zoom.js")


def page(runs: Sequence[RunFiles], hardware: Hardware | None = None, refresh_s: int | None = None) -> str:
    """The page of runs that have been read. `hardware`: of the plan's figures; None: that of the run, if known.
    `refresh_s`: seconds after which a browser reads the page again."""
    shown = [
        Shown(files, COLOURS[place % len(COLOURS)], label, hardware)
        for place, (files, label) in enumerate(zip(runs, _labels(runs), strict=True))
    ]
    title = " · ".join(run.label for run in shown)
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    again = "" if refresh_s is None else f"; read again every {refresh_s} s"
    sections = [element("h1", title, class_="run"), element("p", f"written {written}{again}", class_="under")]
    for run in shown:
        if run.problems:
            sections.append(
                element("ul", *(element("li", f"{run.label}: {line}") for line in run.problems), class_="warnings")
            )
    sections.append(_key_figures(shown[0]) if len(shown) == 1 else _runs_table(shown))
    sections += _charts(shown)
    for run in shown:
        sections += maps.sections(run.metrics.samples, "" if len(shown) == 1 else f": {run.label}")
    sections += [*tables.by_stage(shown), *tables.sources(shown), *tables.events(shown), *tables.configurations(shown)]
    return PAGE.document(f"Report of {title}", sections, STYLE, refresh_s, ZOOM.read_text(encoding="utf-8"))


def _labels(runs: Sequence[RunFiles]) -> list[str]:
    """Names, with the folder where two runs have the same one."""
    names = [files.name for files in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({files.run_dir})" for name, files in zip(names, runs, strict=True)
    ]


# --- how far ----------------------------------------------------------------------------------------------------------


def _key_figures(run: Shown) -> Html:
    line, last = run.line, run.metrics.last
    steps = "" if line.num_steps is None else f"of {line.num_steps:,}"
    figures: list[tuple[str, str, str]] = [
        ("State", line.state.word, line.state.reason),
        (
            "Step",
            number(line.step, f"{line.step:,}"),
            ", ".join(filter(None, [steps, line.stage and f"stage {line.stage}"])),
        ),
    ]
    for name, title, key in (("Loss", "nats per token", "loss"), ("Bits per byte", "of the text", "bits_per_byte")):
        if isinstance(value := last.get(key), float):
            figures.append((name, number(value, f"{value:.4f}"), title))
    for name, key in (("Tokens per second", "tokens_per_s"), ("MFU", "mfu")):
        if isinstance(value := last.get(key), float):
            planned = run.levels.get(key)
            note = f"plan: {short(planned[-1].value)}" if planned else ""
            figures.append((name, number(value, f"{value:.1%}" if key == "mfu" else short(value)), note))
    if isinstance(tokens := last.get("cumulative_tokens"), int):
        figures.append(("Tokens", number(tokens, short(tokens)), "padding included"))
    if isinstance(left := last.get("eta_seconds"), (int, float)) and line.state.word == "running":
        figures.append(("Left", number(left, str(timedelta(seconds=round(left)))), "at this process's speed"))
    if line.checkpoint is not None:
        figures.append(("Checkpoint", number(line.checkpoint, f"step {line.checkpoint:,}"), "the newest complete one"))
    terms = (
        element("div", element("dt", name), element("dd", value), element("dd", small))
        for name, value, small in figures
    )
    return element("dl", *terms, class_="figures")


def _runs_table(shown: Sequence[Shown]) -> Html:
    heads = ["run", "state", "step", "of", "loss", "bits per byte", "tokens/s", "tokens", "checkpoint"]
    rows = []
    for run in shown:
        line, last = run.line, run.metrics.last
        cells = [
            cell(line.step, "{:,}"),
            cell(line.num_steps, "{:,}"),
            *(cell(last.get(key), "{:.4f}") for key in ("loss", "bits_per_byte")),
            cell(last.get("tokens_per_s"), ""),
            cell(last.get("cumulative_tokens"), ""),
            cell(line.checkpoint, "{:,}"),
        ]
        rows.append([join([swatch(run.colour), run.label]), line.state.word, *cells])
    return element("section", table(heads, rows))


# --- charts -----------------------------------------------------------------------------------------------------------


def _charts(shown: Sequence[Shown]) -> Iterator[Html]:
    names = list(dict.fromkeys(name for run in shown for name in run.metrics.series))
    charts: dict[str, list[Html]] = {section: [] for section in SECTIONS}
    for group, found in groups_of(names):
        charts[group.section] += _of_group(shown, group, found)
    for section, drawn in charts.items():
        drawn = [one for one in drawn if one]
        if not drawn:
            continue
        body = element("div", *drawn, class_="charts")
        if section == "Other numbers":
            body = element("details", element("summary", f"{len(drawn)} charts"), body)
        yield element("section", element("h2", section), *_about(section, shown), body)


def _about(section: str, shown: Sequence[Shown]) -> Iterator[Html]:
    if section == "Loss":
        marked = {event.kind for run in shown for event in run.events if event.step} & set(MARKED)
        yield element(
            "p",
            "A line is the mean of the steps at its place, the band around it goes from the smallest to the largest. "
            "Grey vertical lines: a stage begins. A pointer on a chart shows values.",
        )
        yield element(
            "p",
            "A drag along a chart shows those steps in all charts. On a chart with the focus: + and -, left and right. "
            "Escape or a double click shows all steps again.",
            class_="how under",
            hidden="",
        )
        if marked:
            yield legend((kind, MARKED[kind]) for kind in sorted(marked))
    if section == "Speed":
        for run in shown:
            words = f"plan: {run.without_plan}" if run.without_plan else "The dashed line is what the plan says."
            yield element("p", words if len(shown) == 1 else f"{run.label}: {words}", class_="under")


class _Panel(NamedTuple):
    """A chart to be drawn."""

    title: str
    lines: list[Line]
    levels: list[Level]


def _of_group(shown: Sequence[Shown], group: Group, names: Sequence[str]) -> Iterator[Html]:
    last_step = max(run.metrics.last_step for run in shown)
    marks = list(shown[0].stage_marks()) if len(shown) == 1 else []
    if group.title == "Loss":
        marks += [mark for run in shown for mark in run.event_marks()]
    for place, panel in enumerate(_panels(shown, group, names)):
        draw = partial(
            chart, lines=panel.lines, last_step=last_step, unit=group.unit, levels=panel.levels, marks=marks,
            may_be_log=group.may_be_log,
        )  # fmt: skip
        yield draw(panel.title, is_wide=group.is_wide)
        if group.title == "Loss" and place == 0:
            yield draw("Loss, last half", first_step=last_step // 2 + 1)


def _panels(shown: Sequence[Shown], group: Group, names: Sequence[str]) -> Iterator[_Panel]:
    """Of one run the numbers of a group together; of several runs each number alone."""
    if len(shown) == 1:
        (run,) = shown
        lines = [
            Line(_said(name, group) if len(names) > 1 else "", run.metrics.series[name], COLOURS[at % len(COLOURS)])
            for at, name in enumerate(names)
        ]
        yield _Panel(group.title, lines, [level for name in names for level in run.levels.get(name, ())])
        return
    for name in names:
        lines = [Line(run.label, run.metrics.series[name], run.colour) for run in shown if name in run.metrics.series]
        title = group.title if len(names) == 1 else name.replace("_", " ").capitalize()
        yield _Panel(title, lines, [level for run in shown for level in _named(run, name)])


def _named(run: Shown, name: str) -> Iterator[Level]:
    for level in run.levels.get(name, ()):
        yield level._replace(title=f"{run.label}: {level.title}")


def _said(name: str, group: Group) -> str:
    """A name without what the title of its chart says."""
    if group.title == "Gradient norm by part":
        return name.removesuffix("_grad_norm").replace("_", " ")
    return {"loss": "training", "bits_per_byte": "training"}.get(name, name.replace("_", " "))
