"""The page of a plan: valid markup that loads nothing, with the numbers of the JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.plan import costs, summary
from hunyuan_pretrain.plan.charts import Piece, bar, element, join, timeline
from hunyuan_pretrain.plan.costs import Costs, as_data, live
from hunyuan_pretrain.plan.counts import flops_per_token
from hunyuan_pretrain.plan.hardware import load
from hunyuan_pretrain.plan.memory import Peak
from hunyuan_pretrain.plan.page import PAGE, PART_COLOURS, page
from hunyuan_pretrain.plan.page_file import HEAD_BYTES
from hunyuan_pretrain.plan.page_style import STYLE
from hunyuan_pretrain.plan.pipeline import Pass, Slot, simulate
from tests.helpers.planned import hunyuan_large

VOID = {"meta"}
LAYOUT: dict[str, Any] = {
    "tensor_model_parallel_size": 4,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 8,
    "expert_model_parallel_size": 8,
}
RANKS = 512


class Reader(HTMLParser):
    """Checks that elements close in order; collects text, attributes, and the numbers of <data> by section."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.heading = ""
        self.numbers: dict[str, list[float]] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.heading = ""
        if tag == "data":
            self.numbers.setdefault(self.heading, []).append(float(dict(attrs)["value"] or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.heading += data
        if "style" not in self.open:
            self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def planned(hardware: str | None = "H100-80GB", **parallel: Any) -> tuple[Costs, list[summary.Row]]:
    experiment = hunyuan_large(parallel=LAYOUT | parallel)
    found = costs.costs(experiment, RANKS, load(hardware) if hardware else None)
    return found, [*summary.summarise(experiment, RANKS), *costs.rows(found)]


def test_the_page_is_one_file_without_scripts_that_loads_nothing() -> None:
    text = page(*planned(), [])
    reader = read(text)
    assert {tag for tag, _, _ in reader.attributes} & {"script", "link", "img", "iframe", "a", "use", "image"} == set()
    assert not [name for _, name, _ in reader.attributes if name in ("src", "href") or name.startswith("on")]
    assert "//" not in re.sub(r"<!.*?>", "", text)  # no address, not even one without a scheme
    assert "url(" not in text
    assert "@import" not in text
    policy = [value for _, name, value in reader.attributes if name == "content" and "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert PAGE.marker in text[:HEAD_BYTES]


def test_every_colour_is_in_the_style_sheet_in_light_and_dark() -> None:
    text = page(*planned(), [])
    used = set(re.findall(r'style="[a-z]+:var\(--(\w+)\)', text)) | set(PART_COLOURS.values())
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    for scheme in (light, dark):
        assert used <= set(re.findall(r"--(\w+):", scheme))


def test_the_numbers_are_those_of_the_json() -> None:
    found, rows = planned()
    reader, data = read(page(found, rows, [])), json.loads(json.dumps(as_data(found)))
    (stage,), model = data["stages"], found.experiment.model
    peaks = [[*(size for size in live(peak).values() if size), peak.total] for peak in found.peaks[0]]
    assert reader.numbers["Memory by pipeline rank"] == [size for peak in peaks for size in peak]
    assert [peak[-1] for peak in peaks] == [rank["total"] for rank in stage["memory"]]
    step = stage["step"]
    parts = sorted(step["parts"].values(), reverse=True)
    assert reader.numbers["Time of a step"] == [step["seconds"], *parts]
    assert reader.numbers["Schedule of one step"] == step["idle"]
    flops = flops_per_token(model, 4096).total
    assert reader.numbers["FLOPs"] == [flops]
    assert next(row.value for row in rows if row.name == "FLOPs/token") == f"{flops:.4g}"
    costs_of = [stage["days"], stage["gpu_hours"], stage["kwh"]]
    assert reader.numbers["Stages"][5:9] == [step["seconds"], *costs_of]
    assert reader.numbers["Stages"][-3:] == [data["run"][name] for name in ("days", "gpu_hours", "kwh")]
    for row in rows:
        for each in (row.group, row.name, row.value, row.note):
            assert each in reader.text


def test_what_does_not_fit_is_marked_and_warned_of() -> None:
    found, rows = planned(tensor_model_parallel_size=1, sequence_parallel=False)
    (warning,) = costs.problems(found)
    text = page(found, rows, [warning])
    over = sum(rank["missing"] > 0 for rank in as_data(found)["stages"][0]["memory"])
    assert over > 0
    assert text.count('<b class="over">') == over
    assert warning in read(text).text
    assert "does not fit: " in text


def test_without_hardware_the_page_says_what_is_missing() -> None:
    found, rows = planned(None)
    reader = read(page(found, rows, []))
    assert "come with --hardware: B200, GB200" in reader.text
    assert "Schedule of one step" not in reader.text
    assert 'class="mark"' not in page(found, rows, [])


def test_all_text_is_escaped() -> None:
    found, rows = planned()
    assert found.hardware is not None
    name = '<script>alert("&")</script>'
    found = replace(found, hardware=found.hardware.model_copy(update={"name": name}))
    text = page(found, [*rows, summary.Row(name, name, name, name)], [name])
    assert "<script" not in text
    assert name in read(text).text
    assert element("i", '<"', title='"&<') == '<i title="&quot;&amp;&lt;">&lt;&quot;</i>'
    assert join([element("b", "<"), "<"]) == "<b>&lt;</b>&lt;"


def test_the_parts_of_a_peak_add_up() -> None:
    sizes = {name: 10**index for index, name in enumerate(Peak.__annotations__)}
    working = Peak(**sizes | {"update": 0, "validation": None})
    update = Peak(**sizes | {"update": 10**12, "validation": None})
    recorded = Peak(**sizes | {"update": 0})
    assert sum(live(working).values()) == working.total
    assert sum(live(recorded).values()) == recorded.total
    assert live(recorded)["update or validation"] == sizes["validation"]
    assert sum(live(update).values()) == update.total
    assert list(live(update)) == list(PART_COLOURS)
    assert (live(update)["activations"], live(working)["activations"]) == (0, sizes["activations"])


def test_bars_and_passes_are_where_their_numbers_say() -> None:
    drawn = bar([Piece("a", 1, "blue"), Piece("b", 3, "sky")], 8, Piece("all", 4, "red"))
    assert re.findall(r'x="(\S+)" width="(\S+)"', drawn) == [("0", "125"), ("125", "375")]
    assert 'd="M500.00 ' in drawn
    slots = [Slot(Pass("forward", 0, 0), 0.0, 1.0), Slot(Pass("backward", 0, 0), 2.0, 4.0)]
    colours = {"forward": "blue", "backward": "orange"}
    assert re.findall(r'd="(\S+ \S+)"', timeline(slots, 0.0, 4.0, colours)) == [
        "M0.00 0H250.00V20H0.00z",
        "M500.00 0H1000.00V20H500.00z",
    ]
    # a window cuts passes at its ends
    assert re.findall(r'd="([^"]*)"', timeline(slots, 1.0, 2.0, colours)) == ["", "M500.00 0H1000.00V20H500.00z"]


def test_every_pass_of_an_interleaved_schedule_is_drawn() -> None:
    ran = simulate([1.0] * 4, [2.0] * 4, 2, 4)
    for slots in ran.slots:
        drawn = timeline(slots, 0.0, ran.seconds, {"forward": "blue", "backward": "orange"})
        assert drawn.count("M") == len(slots) == 16
        assert drawn.count("<path") == 4
        assert "4 backward passes of model chunk 1, 2 s each" in drawn


def test_a_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path, text = tmp_path / "plan.html", page(*planned(None), [])
    PAGE.write(path, text)
    PAGE.write(path, text)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.html"]
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    for name, rule in (
        ("mine.html", "exists and is no page of a plan (choose another name, or remove the file)"),
        ("none/plan.html", "its folder does not exist"),
        (".", "is a folder"),
        ("x" * 300, ": File name too long"),
    ):
        with pytest.raises(ConfigError, match="--html") as caught:
            PAGE.write(tmp_path / name, text)
        assert rule in str(caught.value)
    assert (tmp_path / "mine.html").read_text() == "<html>mine</html>"
