"""The page of a report: complete, escaped, drawn by a browser without a complaint."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.plan.page_file import HEAD_BYTES
from hunyuan_pretrain.report.drawings import short
from hunyuan_pretrain.report.groups import groups_of
from hunyuan_pretrain.report.page import PAGE, ZOOM, page
from hunyuan_pretrain.report.page_style import STYLE
from hunyuan_pretrain.report.records import RunFiles
from tests.helpers.chromium import CHROMIUM, Page, chromium
from tests.helpers.written_run import PARTS, write_run

XSS = '<script>alert("x")</script><img src=x onerror=alert(1)>'
SECTIONS = [
    *("Loss", "Update", "Speed", "Experts"),
    *(
        "Load by layer and expert",
        "By layer over time",
        "Stages",
        "Tokens by source",
        "Events",
        "Configuration by segment",
    ),
]


def read(*run_dirs: Path) -> list[RunFiles]:
    files = [RunFiles(run_dir) for run_dir in run_dirs]
    for one in files:
        one.read()
    return files


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run of many layers, and one with the same name that has trained less."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "one", 600, layers=16, experts=8)
    return [first, write_run(folder / "two", 60, of=100, seed=1, rank_seconds=False)]


def headings(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


class Balanced(HTMLParser):
    """Checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_safe(text: str) -> None:
    """Valid markup that loads nothing, and runs one script: its own, and no other."""
    reader = Balanced()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert not reader.names & {"link", "img", "iframe", "a", "use", "image", "form", "input", "base"}
    assert not [name for name in reader.attributes if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in STYLE + "".join(re.findall(r'style="(.*?)"', text))
    assert "@import" not in text
    assert re.findall("<script.*?>", text) == ["<script>"]
    script = ZOOM.read_bytes()
    assert f"<script>{script.decode()}</script>" in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(", script.decode())
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy, quote=False)}">' in text


def test_a_page_of_one_run_has_every_section_and_every_number_in_a_chart(runs: list[Path]) -> None:
    files = read(runs[0])
    text = page(files)
    assert_safe(text)
    assert headings(text) == SECTIONS
    assert PAGE.marker in text[:HEAD_BYTES]
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    assert len(titles) == len(set(titles)) == 17 + 6 + 4, "charts, moments, maps over time"
    by_part = text[text.index("Gradient norm by part") :].partition("</figcaption>")[0]
    assert all(part.replace("_", " ") in by_part for part in PARTS)
    assert text.count('class="line"') >= 24
    loss = files[0].metrics.last["loss"]
    assert f'<data value="{loss!r}">{loss:.4f}</data>' in text
    assert "optimizer.lr: 0.01 -&gt; 0.005 (scales the learning rate)" in text
    assert "2 started, 1 saved, 1 alarm, 1 stopped" in text
    assert "alarm at step 300: 2 dead experts" in text, "in the chart of the loss"
    assert "stage decay begins at step 2" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (25_600.0, "25,600"),
        (1e5, "100k"),
        (6.0e10, "60G"),
        (2e-5, "2e-05"),
        (0.4049, "0.4049"),
        (1e19, "1e+19"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
    assert short(-value) == (f"-{text}" if value else "-0")


def test_a_spike_of_one_step_is_in_the_drawing(tmp_path: Path) -> None:
    """600 steps in at most 512 stretches: the band reaches the top of the chart."""
    text = page(read(write_run(tmp_path / "run", 600)))
    chart = text[text.index("<b>Loss</b>") :].partition("</figure>")[0]
    band = re.findall(r'd="([^"]+)" class="band"', chart)[0]
    heights = {float(pair.split()[1]): float(pair.split()[0]) for pair in band.strip("Mz").split("L")}
    spike = [x for y, x in heights.items() if abs(x - 1000 * 450 / 600) < 3 and y < 170]
    assert spike


def test_several_runs_are_overlaid_and_told_apart(runs: list[Path]) -> None:
    text = page(read(*runs))
    assert_safe(text)
    loss = text[text.index("<b>Loss</b>") :].partition("</figure>")[0]
    labels = [f"written ({run_dir})" for run_dir in runs]
    assert [re.findall(r"</i>(.*?) <data", loss)] == [labels]
    assert "What differs between the runs" in headings(text)
    assert all(f"{name}: {label}" in headings(text) for name in ("Events", "Stages") for label in labels)
    assert "Attention grad norm" in text
    differences = text[text.index("What differs between the runs") :]
    assert '<th scope="row">stages.1.tokens</th>' in differences
    assert '<th scope="row">optimizer.lr</th>' not in differences


def test_figures_of_the_plan_are_drawn_where_the_hardware_is_known(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", 50)
    assert "not computed for stage warmup: precision.dtype=fp32" in page(read(run_dir))
    history = json.loads((run_dir / "segments.json").read_text())
    for segment in history["segments"]:
        segment["experiment"]["precision"]["dtype"] = "bf16"
    (run_dir / "segments.json").write_text(json.dumps(history))
    text = page(read(run_dir))
    assert "The dashed line is what the plan says." in text
    assert text.count("plan of stage decay on H200-141GB") == 4 * 2, "speed, time, MFU, memory; in two segments"
    (run_dir / "events.jsonl").unlink()
    assert "no profile of its hardware; --hardware gives one" in page(read(run_dir))


def test_names_from_a_run_are_text(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", 30, name=XSS)
    lines = (run_dir / "metrics.jsonl").read_text().replace('"decay"', json.dumps(XSS)).replace('"loss"', '"loss"')
    extra = {"step": 31, "stage": XSS, "loss": 1.0, XSS: 1.0, f"{XSS}_grad_norm": 2.0}
    (run_dir / "metrics.jsonl").write_text(lines + json.dumps(extra) + "\n")
    event = {"time": XSS, "kind": XSS, "step": 5, "text": XSS}
    (run_dir / "events.jsonl").write_text(
        "".join(json.dumps({**event, "kind": kind}) + "\n" for kind in (XSS, "alarm"))
    )
    history = json.loads((run_dir / "segments.json").read_text())
    history["segments"][1]["changes"] = [XSS]
    history["segments"][1]["sources"] = {"/data/train": history["segments"][1]["sources"]["/data/train"]}
    (run_dir / "segments.json").write_text(json.dumps(history))
    for files in (read(run_dir), read(run_dir, write_run(tmp_path / "other", 5))):
        text = page(files)
        assert_safe(text)
        assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in text


@pytest.mark.parametrize("names", [["metrics.jsonl"], ["resolved.yaml"], ["resolved.yaml", "segments.json"]])
def test_a_page_is_made_of_whatever_is_there(runs: list[Path], tmp_path: Path, names: list[str]) -> None:
    for name in names:
        shutil.copy(runs[0] / name, tmp_path / name)
    text = page(read(tmp_path), refresh_s=5)
    assert_safe(text)
    assert '<meta http-equiv="refresh" content="5">' in text
    assert ("Loss" in headings(text)) == ("metrics.jsonl" in names)


def test_the_size_of_a_page_is_bounded(runs: list[Path], tmp_path: Path) -> None:
    """More steps than series.MOST add nothing to its lines, nor more layers than maps.MOST_CELLS to its maps."""
    assert len(page(read(runs[0]))) < 700_000
    assert len(page(read(write_run(tmp_path / "run", 20, layers=64, experts=64)))) < 700_000


# --- in a browser -----------------------------------------------------------------------------------------------------

FRAMES = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe src="report.html" style="border:0;width:390px;height:900px"></iframe>
<iframe src="report.html" style="border:0;width:1280px;height:900px"></iframe>
<pre></pre><script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const charts = [...page.querySelectorAll("figure")].map(figure => {
      const box = figure.querySelector("svg").getBoundingClientRect();
      const drawn = [...figure.querySelectorAll("path.line, .heat path")].map(path => path.getTotalLength());
      return [figure.querySelector("b").textContent, box.width, box.height, Math.max(0, ...drawn)];
    });
    const text = frame.contentWindow.getComputedStyle(page.body);
    return {width: root.scrollWidth, room: root.clientWidth, charts, paper: text.backgroundColor, ink: text.color};
  });
  document.querySelector("pre").textContent = JSON.stringify(found);
});
</script>"""


def browsed(chromium: str, folder: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """What the frames measure, and what the browser complains of."""
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--dump-dom", *options]
    done = subprocess.run([*command, (folder / "frames.html").as_uri()], capture_output=True, text=True, timeout=120)
    measured = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert measured, done.stderr
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Content Security" in line]
    return json.loads(measured[1]), "\n".join(complaints)


def test_a_browser_draws_every_chart_in_light_and_dark_and_on_a_phone(runs: list[Path], tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium, such as Debian's package chromium, to open the page")
    text = page(read(*runs))
    (tmp_path / "report.html").write_text(text)
    (tmp_path / "frames.html").write_text(FRAMES)
    papers = []
    for options in ((), ("--blink-settings=preferredColorScheme=0",)):
        frames, complaints = browsed(chromium, tmp_path, *options)
        assert complaints == ""
        assert [frame["width"] for frame in frames] == [frame["room"] for frame in frames], "nothing is wider"
        assert frames[0]["room"] <= 390
        for frame in frames:
            assert len(frame["charts"]) == text.count("<figure")
            for title, width, height, length in frame["charts"]:
                assert width > 150, title
                assert height > 100, title
                assert length > 0, title
            assert frame["paper"] != frame["ink"]
        papers.append(frames[0]["paper"])
    assert papers == ["rgb(255, 255, 255)", "rgb(20, 24, 29)"]


# --- zoom -------------------------------------------------------------------------------------------------------------

DRAWN = """[...document.querySelectorAll("figure:not(.heat)")].map(figure => ({
  title: figure.querySelector("b").textContent,
  first: Number(figure.querySelector("svg").dataset.first),
  ends: [...figure.querySelectorAll(".ends i")].map(end => end.textContent),
  ticks: [...figure.querySelectorAll(".ticks i")].map(tick => tick.textContent),
  heights: [...figure.querySelectorAll(".ticks i")].map(tick => parseFloat(tick.style.bottom)),
  paths: [...figure.querySelectorAll("path")].map(path => path.getAttribute("d")),
  looks: [...figure.querySelectorAll(".look title")].map(title => title.textContent),
  hidden: figure.hidden,
}))"""
SAID = "document.querySelector('.zoom').hidden ? '' : document.querySelector('.zoom span').textContent"


def numbers(paths: list[str]) -> list[float]:
    return [float(word) for path in paths for word in re.findall(r"-?[\d.]+", path)]


@pytest.fixture(scope="module")
def opened(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page of the longer run, as `report` has written it."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium, such as Debian's package chromium, to open the page")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "report.html").write_text(page(read(runs[0])))
    with chromium(folder / "profile") as browser:
        browser.open((folder / "report.html").as_uri())
        yield browser
        assert browser.errors == []


@pytest.fixture
def whole(opened: Page) -> list[dict[str, Any]]:
    """All charts, without a zoom."""
    opened.run("document.querySelector('.zoom button').click()")
    assert opened.run(SAID) == ""
    return opened.run(DRAWN)


def test_a_drag_shows_its_steps_in_all_charts_and_a_reset_what_was_written(
    runs: list[Path], opened: Page, whole: list[dict[str, Any]]
) -> None:
    """A redrawn page is that of drawings.py: coordinates within the rounding of a tie, and every word."""
    written = re.findall(r'<path[^>]* d="([^"]*)"', page(read(runs[0])).partition("Load by layer")[0])
    drawn = [path for chart in whole for path in chart["paths"]]
    assert numbers(drawn) == pytest.approx(numbers(written), abs=0.11)

    opened.drag(".plot svg", 0.25, 0.5)
    assert opened.run(SAID) == "steps 151 to 301; a point is up to 2 steps"
    zoomed = opened.run(DRAWN)
    assert [chart["title"] for chart in zoomed if chart["hidden"]] == ["Loss, last half"]
    assert {tuple(chart["ends"]) for chart in zoomed if not chart["hidden"]} == {("151", "226", "301")}
    loss, before = zoomed[0], whole[0]
    assert loss["paths"] != before["paths"]
    assert len(loss["looks"]) == 48
    assert sum("validation" in look for look in loss["looks"]) == 3, "after 180, 240 and 300 steps"
    assert all(height >= 0 for chart in zoomed for height in chart["heights"])

    opened.press("Escape")
    for reset in (
        lambda: opened.press("Escape"),
        lambda: opened.click(".zoom button"),
        lambda: opened.run("document.querySelector('.plot svg').dispatchEvent(new MouseEvent('dblclick'))"),
    ):
        opened.drag(".plot.wide svg", 0.7, 0.6)
        assert opened.run(SAID).startswith("steps 360 to 420;")
        reset()
        assert opened.run(SAID) == ""
        assert opened.run(DRAWN) == whole


def test_a_range_of_few_steps_shows_each_kept_value(tmp_path: Path, opened: Page, whole: list[dict[str, Any]]) -> None:
    opened.drag(".plot svg", 0.25, 0.28)
    titles = opened.run(DRAWN)[0]["looks"]
    assert opened.run(SAID) == "steps 151 to 169; a point is up to 2 steps"
    assert [title.splitlines()[0] for title in titles] == [f"steps {step} to {step + 1}" for step in range(151, 170, 2)]
    assert "training: " in titles[0]


def test_keys_zoom_and_move(opened: Page, whole: list[dict[str, Any]]) -> None:
    opened.run("document.querySelector('.plot svg').focus()")
    for key, said in (
        ("ArrowRight", ""),
        ("+", "steps 151 to 450"),
        ("ArrowRight", "steps 226 to 525"),
        ("ArrowRight", "steps 301 to 600"),
        ("ArrowRight", "steps 301 to 600"),
        ("+", "steps 376 to 525"),
        ("ArrowLeft", "steps 339 to 488"),
        ("-", "steps 265 to 563"),
        ("-", "steps 4 to 600"),
        ("-", ""),
    ):
        opened.press(key)
        assert opened.run(SAID).partition(";")[0] == said, key
    for _ in range(12):
        opened.press("+")
    first, last = re.findall(r"\d+", opened.run(SAID))[:2]
    assert int(last) - int(first) >= 1, "a range is never empty"


def test_a_finger_zooms_along_a_chart_and_scrolls_across_it(opened: Page, whole: list[dict[str, Any]]) -> None:
    opened.call("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        opened.touch(".plot svg", 0.25, 0.5)
        assert opened.run(SAID).startswith("steps 151 to 301")
        opened.press("Escape")
        opened.touch(".plot svg", 0.5, 0.5, down=-200)
        assert opened.run(SAID) == ""
    finally:
        opened.call("Emulation.setTouchEmulationEnabled", enabled=False)


def test_a_range_outlives_a_page_that_is_read_again(opened: Page, whole: list[dict[str, Any]]) -> None:
    opened.drag(".plot svg", 0.25, 0.5)
    before = opened.run(DRAWN)
    opened.open(opened.run("location.href"))
    assert opened.run(DRAWN) == before
    opened.drag(".plot svg", 0.1, 0.9, is_released=False)
    opened.press("Escape")
    assert opened.run("document.querySelectorAll('.chosen').length") == 0, "the drag ends, the range stays"
    assert opened.run(DRAWN) == before


def test_benchmarks_have_charts_of_their_own() -> None:
    names = ["loss", "tasks/piqa/acc", "tasks/mmlu/acc_norm", "tasks/gsm8k/exact_match.strict-match", "tasks/x/bleu"]
    found = {group.title: set(of_group) for group, of_group in groups_of(names) if group.section == "Benchmarks"}
    assert found == {
        "Benchmarks: share that is right": set(names[1:4]),
        "Benchmarks: other numbers": {"tasks/x/bleu"},
    }


def test_the_answers_of_pairs_are_in_one_chart() -> None:
    answers = ["chosen_log_probability", "rejected_log_probability"]
    found = [
        of_group for group, of_group in groups_of(["loss", "preference_loss", *answers]) if group.section == "Loss"
    ]
    assert found == [["loss"], ["preference_loss"], answers]
