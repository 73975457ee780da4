"""Heat maps of a run: load by layer and expert at a few moments, and by layer over time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hunyuan_pretrain.plan.charts import Html, element
from hunyuan_pretrain.report.drawings import ENTROPIES, LOADS, SHARES, heat_map, shades_legend
from hunyuan_pretrain.report.records import HEAT_COLUMNS, Sample

MOMENTS = 6
"""Maps of layer x expert."""
MOST_CELLS = 12_000
"""Of all these maps together; of a larger model there are fewer of them."""


def sections(samples: Sequence[Sample], of_run: str) -> Iterator[Html]:
    """The maps of a run, if it has values by layer."""
    loads = [sample for sample in samples if _is_matrix(sample.lists.get("expert_load"))]
    if loads:
        shape = _shape(loads[-1])
        loads = [sample for sample in loads if _shape(sample) == shape]
        yield _experts(loads, *shape, of_run)
        yield _over_time(loads, shape[0], of_run)


def _experts(loads: Sequence[Sample], num_layers: int, num_experts: int, of_run: str) -> Html:
    count = max(1, min(MOMENTS, MOST_CELLS // (num_layers * num_experts)))
    drawn = [
        heat_map(
            f"step {sample.step:,}",
            [[load * num_experts for load in layer] for layer in sample.lists["expert_load"]],
            LOADS,
            ("expert 0", f"expert {num_experts - 1}"),
        )
        for sample in _evenly(loads, count)
    ]
    return element(
        "section",
        element("h2", f"Load by layer and expert{of_run}"),
        element("p", "How often a step's tokens chose an expert, before recycling, over an even share."),
        shades_legend(LOADS),
        element("div", *drawn, class_="maps"),
    )


def _over_time(loads: Sequence[Sample], num_layers: int, of_run: str) -> Html:
    columns = _evenly(loads, HEAT_COLUMNS)
    ends = f"step {columns[0].step:,}", f"step {columns[-1].step:,}"
    drawn = []
    for title, name, shades in (
        ("Busiest expert, over an even share", "expert_load", LOADS),
        ("Recycled, share of choices", "recycled_share", SHARES),
        ("Dropped, share of choices", "dropped_share", SHARES),
        ("Router entropy, of the largest possible", "router_entropy", ENTROPIES),
    ):
        values = [sample.lists.get(name) for sample in columns]
        if name == "expert_load":
            values = [[max(layer) * len(layer) for layer in value] for value in values if value]
        if all(isinstance(value, list) and len(value) == num_layers for value in values):
            rows = [[value[layer] for value in values] for layer in range(num_layers)]  # type: ignore[index]
            drawn.append(element("div", heat_map(title, rows, shades, ends), shades_legend(shades)))
    text = f"{len(columns)} of the logged steps, evenly over the run."
    return element(
        "section",
        element("h2", f"By layer over time{of_run}"),
        element("p", text),
        element("div", *drawn, class_="charts"),
    )


def _evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` of them, the first and the last included."""
    if len(samples) <= count:
        return list(samples)
    if count == 1:
        return [samples[-1]]
    return [samples[round(place * (len(samples) - 1) / (count - 1))] for place in range(count)]


def _shape(sample: Sample) -> tuple[int, int]:
    loads = sample.lists["expert_load"]
    return len(loads), len(loads[0])


def _is_matrix(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)
