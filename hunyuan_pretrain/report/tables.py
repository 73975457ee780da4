"""Tables of a report: stages, tokens by source, events, configurations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hunyuan_pretrain.config.describe import flatten
from hunyuan_pretrain.config.errors import ConfigError, show_value
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.plan.charts import Html, Piece, bar, element, legend, number, row, table
from hunyuan_pretrain.report.drawings import COLOURS, short
from hunyuan_pretrain.report.series import Series
from hunyuan_pretrain.report.shown import Shown, cell
from hunyuan_pretrain.report.sources import tokens_by_source

SHOWN_EVENTS = 100


def by_stage(shown: Sequence[Shown]) -> Iterator[Html]:
    """Losses and speed of each stage of each run."""
    heads = ["stage", "records", "loss, mean", "lowest", "last", "bits per byte, last", "tokens/s, mean", "MFU, mean"]
    for run in shown:
        rows = []
        for stage, series in run.metrics.by_stage.items():
            loss = list(series["loss"]) if "loss" in series else []
            if not loss:
                continue
            rate, mfu = (_mean(series.get(name)) for name in ("tokens_per_s", "mfu"))
            bits = series["bits_per_byte"].last if "bits_per_byte" in series else None
            rows.append(
                [
                    stage,
                    cell(series["loss"].num_values, "{:,}"),
                    cell(_mean(series["loss"]), "{:.4f}"),
                    cell(min(one.low for one in loss), "{:.4f}"),
                    *(cell(value, "{:.4f}") for value in (series["loss"].last, bits)),
                    cell(rate, ""),
                    cell(mfu, "{:.1%}"),
                ]
            )
        if rows:
            yield element("section", element("h2", f"Stages{_of(run, shown)}"), table(heads, rows))


def _mean(series: Series | None) -> float | None:
    return None if series is None else series.mean


def _of(run: Shown, shown: Sequence[Shown]) -> str:
    return "" if len(shown) == 1 else f": {run.label}"


def sources(shown: Sequence[Shown]) -> Iterator[Html]:
    """What each run has read, by stage."""
    for run in shown:
        try:
            read = tokens_by_source(run.files.segments, run.metrics.last_step)
        except (ConfigError, DataFormatError, ValueError) as error:
            text = f"not known: {str(error).splitlines()[-1].strip()}"
            yield element("section", element("h2", f"Tokens by source{_of(run, shown)}"), element("p", text))
            continue
        names = list(dict.fromkeys(name for found in read.values() for name in found))
        if not names:
            continue
        colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
        whole = max(sum(found.values()) for found in read.values())
        lines, rows = [], []
        for stage, found in read.items():
            total = sum(found.values())
            pieces = [
                Piece(f"{name}: {short(tokens)}, {tokens / total:.1%}", tokens, colours[name])
                for name, tokens in found.items()
            ]
            lines.append(row(stage, bar(pieces, whole), number(total, short(total))))
            rows += [
                [name, stage, number(tokens, short(tokens)), f"{tokens / total:.1%}"] for name, tokens in found.items()
            ]
        yield element(
            "section",
            element("h2", f"Tokens by source{_of(run, shown)}"),
            element(
                "p", f"Read up to step {run.metrics.last_step:,}, without padding; computed from the run's history."
            ),
            legend(colours.items()),
            element("div", *lines, class_="chart"),
            element("details", element("summary", "Tokens"), table(["source", "stage", "tokens", "share"], rows)),
        )


def events(shown: Sequence[Shown]) -> Iterator[Html]:
    """What happened to each run, the latest first."""
    for run in shown:
        if not run.events:
            continue
        kinds = [event.kind for event in run.events]
        counts = ", ".join(f"{kinds.count(kind):,} {kind}" for kind in dict.fromkeys(kinds))
        latest = run.events[-SHOWN_EVENTS:][::-1]
        rows = [
            [
                event.time.replace("T", " ").rstrip("Z"),
                event.kind,
                "" if event.step is None else f"{event.step:,}",
                event.text,
            ]
            for event in latest
        ]
        more = f" The latest {SHOWN_EVENTS} are shown." if len(run.events) > SHOWN_EVENTS else ""
        shown_table = table(["time, UTC", "event", "step", ""], rows)
        yield element(
            "section",
            element("h2", f"Events{_of(run, shown)}"),
            element("p", f"{counts}.{more}"),
            element("div", shown_table, class_="events"),
        )


def configurations(shown: Sequence[Shown]) -> Iterator[Html]:
    """What has changed from segment to segment of each run, and what differs between the runs."""
    for run in shown:
        items = []
        for place, segment in enumerate(run.files.segments):
            first = "no setting has changed" if place else "the first configuration"
            ranks = f"{segment.world_size} ranks, {segment.layout}" if segment.world_size else ""
            head = ", ".join(filter(None, [f"from step {segment.first_step + 1:,}", segment.started, ranks]))
            changes = [element("li", line) for line in segment.changes]
            items.append(element("h3", head))
            items.append(element("ul", *changes, class_="diff") if changes else element("p", first, class_="under"))
        if len(run.files.segments) > 1:
            yield element("section", element("h2", f"Configuration by segment{_of(run, shown)}"), *items)
    yield from _differences([run for run in shown if run.files.segments])


def _differences(known: Sequence[Shown]) -> Iterator[Html]:
    if len(known) < 2:
        return
    flat = [flatten(run.files.segments[-1].experiment) for run in known]
    keys = dict.fromkeys(key for one in flat for key in one)
    differing = [key for key in keys if len({repr(one.get(key)) for one in flat}) > 1]
    rows = [[key, *(show_value(one.get(key), 80) for one in flat)] for key in differing]
    heads = ["setting", *(run.label for run in known)]
    yield element("section", element("h2", "What differs between the runs"), table(heads, rows))
