"""The page of `plan --html`: what a run takes, as one HTML file that loads nothing and runs no script.

Its numbers are those of `plan --json`: each is in a <data> element with its exact value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from hunyuan_pretrain.plan.charts import (
    NARROWEST,
    WIDTH,
    Html,
    Piece,
    bar,
    element,
    join,
    legend,
    number,
    row,
    shortest,
    table,
    timeline,
)
from hunyuan_pretrain.plan.costs import Costs, by_shape, live, part_name
from hunyuan_pretrain.plan.counts import flops_per_token
from hunyuan_pretrain.plan.hardware import names
from hunyuan_pretrain.plan.memory import Peak, missing
from hunyuan_pretrain.plan.page_file import PageFile
from hunyuan_pretrain.plan.page_style import STYLE
from hunyuan_pretrain.plan.pipeline import Timeline
from hunyuan_pretrain.plan.summary import Row, gib
from hunyuan_pretrain.plan.timing import StepTime

PAGE = PageFile("plan", "--html", "a plan")

PART_COLOURS = {
    "weights": "blue",
    "gradients": "sky",
    "optimizer": "navy",
    "FP8 weights": "violet",
    "activations": "orange",
    "at work": "yellow",
    "messages": "green",
    "update": "rose",
    "update or validation": "rose",
    "allocator": "grey",
    "CUDA and NCCL": "pale",
}
PASS_COLOURS = {"forward": "blue", "backward": "orange"}
FLOP_COLOURS = {
    "experts and router": "blue",
    "attention projections": "sky",
    "output layer": "navy",
    "attention": "orange",
}


def page(found: Costs, rows: Sequence[Row], warnings: Sequence[str]) -> str:
    """The page of a plan: `rows` is its table, `warnings` what else the command prints."""
    experiment = found.experiment
    layout = next(row.note for row in rows if (row.group, row.name) == ("layout", "ranks"))
    where = f"{found.ranks} ranks" + (f" on {found.hardware.name}" if found.hardware else "")
    groups = by_shape(experiment.stages)
    sections = [element("h1", experiment.name), element("p", f"{where}: {layout}", class_="under")]
    if warnings:
        sections.append(element("ul", *(element("li", line) for line in warnings), class_="warnings"))
    sections.append(_key_figures(found))
    for numbers in groups:
        stages = [experiment.stages[number].name for number in numbers]
        title = "" if len(groups) == 1 else f", {', '.join(stages)}"
        sections.append(_memory(found, numbers[0], title))
        if found.hardware:
            sections += _time(found, numbers[0], title)
    if not found.hardware:
        choice = (
            f"Days, the time of a step and its schedule come with --hardware: {', '.join(names())}, or a YAML file."
        )
        sections.append(element("section", element("h2", "Time"), element("p", choice)))
    sections += [_flops(found), _stages(found), _text(rows)]
    return PAGE.document(f"Plan of {experiment.name}", sections, STYLE)


def _key_figures(found: Costs) -> Html:
    fullest = max((peak for peaks in found.peaks for peak in peaks), key=lambda peak: peak.total)
    figures: list[tuple[str, Html, str]] = []
    note = ""
    if found.hardware:
        lacking = missing(fullest, found.hardware)
        note = f"does not fit: {gib(lacking)} too much" if lacking > 0 else f"fits, {gib(-lacking)} left"
    figures.append(("Memory peak", number(fullest.total, gib(fullest.total)), note))
    if found.hardware:
        stage, longest = max(
            zip(found.experiment.stages, found.stages[:-1], strict=True), key=lambda each: each[1].days
        )
        whole, step = found.stages[-1], longest.step
        assert step is not None
        figures += [
            ("Days", number(whole.days, f"{whole.days:.3g}"), "of training alone"),
            ("GPU-hours", number(whole.gpu_hours, f"{whole.gpu_hours:,.0f}"), f"{whole.kwh:,.0f} kWh"),
            ("Step", number(step.seconds, f"{step.seconds:.3g} s"), f"in stage {stage.name}"),
            ("MFU", number(step.mfu, f"{step.mfu:.1%}"), f"{step.tflops_per_gpu:.0f} TFLOP/s a GPU in 6 N D"),
        ]
    terms = (
        element("div", element("dt", name), element("dd", value), element("dd", small))
        for name, value, small in figures
    )
    return element("dl", *terms, class_="figures")


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(found: Costs, stage: int, title: str) -> Html:
    peaks, hardware = found.peaks[stage], found.hardware
    whole = max(peak.total for peak in peaks)
    mark = None
    about = "What is live at the peak of each pipeline rank, on the rank that needs the most."
    if hardware is not None:
        whole = max(whole, round(hardware.memory_bytes))
        available = f"the memory of {hardware.name}: {gib(round(hardware.memory_bytes))}"
        mark = Piece(available, hardware.memory_bytes, "red")
        about += f" The red line is {available}."
    used = {part for peak in peaks for part, size in live(peak).items() if size}
    lines = []
    for rank, peak in enumerate(peaks):
        pieces = [
            Piece(f"pipeline rank {rank}: {part} {gib(size)}", size, PART_COLOURS[part])
            for part, size in live(peak).items()
            if size
        ]
        is_over = hardware is not None and missing(peak, hardware) > 0
        value = element("b", gib(peak.total), class_="over") if is_over else gib(peak.total)
        lines.append(row(f"rank {rank}", bar(pieces, whole * 1.01, mark), value, "row tight"))
    return element(
        "section",
        element("h2", f"Memory by pipeline rank{title}"),
        element("p", about),
        legend((part, colour) for part, colour in PART_COLOURS.items() if part in used),
        element("div", *lines, class_="chart"),
        element("details", element("summary", "Bytes"), _bytes(peaks, used)),
    )


def _bytes(peaks: Sequence[Peak], used: set[str]) -> Html:
    parts = [part for part in PART_COLOURS if part in used]
    rows = [
        [f"rank {rank}", *(number(size, f"{size:,}") for size in (*(live(peak)[part] for part in parts), peak.total))]
        for rank, peak in enumerate(peaks)
    ]
    return table(["", *parts, "total"], rows)


# --- time -------------------------------------------------------------------------------------------------------------


def _time(found: Costs, stage: int, title: str) -> Iterator[Html]:
    step = found.stages[stage].step
    assert step is not None
    yield _parts(step, title)
    yield _schedule(step, title)


def _parts(step: StepTime, title: str) -> Html:
    parts = sorted(step.parts.items(), key=lambda part: -part[1])
    longest = max(step.parts.values())
    lines = []
    for part, seconds in parts:
        value = join([number(seconds, f"{seconds:.3g} s"), f", {seconds / step.seconds:.1%}"])
        piece = Piece(f"{part_name(part)}: {seconds:.4g} s", seconds, "waiting" if part == "pipeline" else "blue")
        lines.append(row(part_name(part), bar([piece], longest), value))
    about = join(
        [
            "A step takes ",
            number(step.seconds, f"{step.seconds:.4g} s"),
            ". The parts are those of the pipeline rank that computes longest",
            ", and pipeline is its waiting for others." if len(step.timeline.slots) > 1 else ".",
        ]
    )
    heading = element("h2", f"Time of a step{title}")
    return element("section", heading, element("p", about), element("div", *lines, class_="chart"))


def _schedule(step: StepTime, title: str) -> Html:
    ran = step.timeline
    about = (
        "When each pipeline rank runs the passes of its micro-batches, simulated. They take "
        f"{ran.seconds:.4g} s of the step's {step.seconds:.4g} s; weights are gathered before them, gradients reduced "
        "and weights updated after them."
    )
    if len(ran.slots) > 1:
        about += f" Passes in flight, by rank: {', '.join(map(str, ran.in_flight))}."
    if any(slot.what.chunk for slot in ran.slots[0]):
        about += " Later model chunks are paler."
    charts = [_passes(ran, 0.0, ran.seconds)]
    if (near := min(map(shortest, ran.slots)) * WIDTH / NARROWEST) < ran.seconds:
        charts += [element("h3", "Its beginning"), _passes(ran, 0.0, near)]
        charts += [element("h3", "Its end"), _passes(ran, ran.seconds - near, near)]
    return element(
        "section",
        element("h2", f"Schedule of one step{title}"),
        element("p", about),
        legend((f"{kind} pass", colour) for kind, colour in PASS_COLOURS.items()),
        *charts,
    )


def _passes(ran: Timeline, start: float, seconds: float) -> Html:
    """What the pipeline ranks do in the `seconds` from `start`."""
    lines = [
        row(
            f"rank {rank}",
            timeline(slots, start, seconds, PASS_COLOURS),
            join([number(idle, f"{idle:.1%}"), " idle"]) if seconds == ran.seconds else "",
            "row tight",
        )
        for rank, (slots, idle) in enumerate(zip(ran.slots, ran.idle, strict=True))
    ]
    ends = (element("i", f"{at:.4g} s") for at in (start, start + seconds))
    return element("div", *lines, row("", element("span", *ends, class_="ends"), "", "row tight"), class_="chart")


# --- FLOPs, stages, text ----------------------------------------------------------------------------------------------


def _flops(found: Costs) -> Html:
    experiment = found.experiment
    each = {
        stage.sequence_length: flops_per_token(experiment.model, stage.sequence_length) for stage in experiment.stages
    }
    whole = max(flops.total for flops in each.values())
    lines = []
    for length, flops in each.items():
        parts = {
            "experts and router": flops.experts + flops.router,
            "attention projections": flops.attention_projections,
            "output layer": flops.output_head,
            "attention": flops.attention_scores + flops.attention_values,
        }
        pieces = [Piece(f"{part}: {size:.4g}", size, FLOP_COLOURS[part]) for part, size in parts.items()]
        lines.append(row(f"at {length:,} tokens", bar(pieces, whole), number(flops.total, f"{flops.total:.4g}")))
    about = "FLOPs of a token, forward and backward, by sequence length; one document fills a sequence."
    return element(
        "section",
        element("h2", "FLOPs"),
        element("p", about),
        legend(FLOP_COLOURS.items()),
        element("div", *lines, class_="chart"),
    )


def _stages(found: Costs) -> Html:
    heads = ["stage", "steps", "sequence", "batch", "tokens", "FLOPs"]
    heads += ["step", "days", "GPU-hours", "kWh"] if found.hardware else []
    lines, all_steps, all_tokens, all_flops = [], 0, 0, 0.0
    for at, stage in enumerate(found.experiment.stages):
        tokens = stage.num_steps * stage.global_batch_tokens
        flops = tokens * flops_per_token(found.experiment.model, stage.sequence_length).total
        all_steps, all_tokens, all_flops = all_steps + stage.num_steps, all_tokens + tokens, all_flops + flops
        counts = (stage.num_steps, stage.sequence_length, stage.global_batch_sequences, tokens)
        cells = [stage.name, *(number(count, f"{count:,}") for count in counts), number(flops, f"{flops:.4g}")]
        lines.append([*cells, *_cost_cells(found, at)])
    sums = number(all_tokens, f"{all_tokens:,}"), number(all_flops, f"{all_flops:.4g}")
    lines.append(["all", number(all_steps, f"{all_steps:,}"), "", "", *sums, *_cost_cells(found, -1)])
    return element("section", element("h2", "Stages"), table(heads, lines))


def _cost_cells(found: Costs, at: int) -> Iterable[Html]:
    if not found.hardware:
        return
    cost = found.stages[at]
    yield number(cost.step.seconds, f"{cost.step.seconds:.3g} s") if cost.step else Html()
    yield number(cost.days, f"{cost.days:.3g}")
    yield number(cost.gpu_hours, f"{cost.gpu_hours:,.0f}")
    yield number(cost.kwh, f"{cost.kwh:,.0f}")


def _text(rows: Sequence[Row]) -> Html:
    lines, previous = [], ""
    for each in rows:
        if each.group != previous:
            lines.append(element("tr", element("th", each.group, colspan=3, scope="colgroup")))
        previous = each.group
        lines.append(element("tr", *(element("td", text) for text in (each.name, each.value, each.note))))
    return element("section", element("h2", "All rows"), element("table", element("tbody", *lines), class_="rows"))
