"""A page in headless Chromium, steered through the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_S = 60


class Page:
    """One tab. `errors` are the errors of its console, and exceptions that nothing caught."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._rest, self._number = commands, answers, b"", 0
        self._session: str | None = None
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._answers, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        shown = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(shown["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded" and shown["entry"]["level"] == "error":
            self.errors.append(json.dumps(shown["entry"]))
        if message.get("method") == "Runtime.consoleAPICalled" and shown["type"] in ("error", "assert"):
            self.errors.append(json.dumps(shown["args"]))
        return message

    def open(self, address: str, width: int = 1280, height: int = 800, **features: str) -> None:
        """Load a page. features: of media queries, such as prefers_color_scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=named)
        self.call("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        options = {"returnByValue": True, "awaitPromise": True, "allowUnsafeEvalBlockedByCSP": False}
        result = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + WAIT_S
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, (condition, self.errors, self.run("document.body.innerText"))
            time.sleep(0.03)

    def type(self, text: str) -> None:
        """As if it were typed or pasted where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, text: str = "") -> None:
        """One key, such as Enter (text "\\r"), Escape or Tab."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "+": 187, "-": 189}
        about = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, selector: str) -> None:
        """The middle of the first element that matches."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.scrollIntoView({{block: 'center'}})")
        sides = self.run(f"Object.values({found}.getBoundingClientRect().toJSON())")  # x, y, width, height, ...
        place = sides[0] + sides[2] / 2, sides[1] + sides[3] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def drag(self, selector: str, start: float, end: float, is_released: bool = True) -> None:
        """Across the first element that matches; start, end: shares of its width."""
        places = self._places(selector, start, (start + end) / 2, end)
        steps = list(zip(("mousePressed", "mouseMoved", "mouseMoved"), places, strict=True))
        for kind, (x, y) in steps + ([("mouseReleased", places[-1])] if is_released else []):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def touch(self, selector: str, start: float, end: float, down: float = 0.0) -> None:
        """The same with a finger, which also moves `down` pixels."""
        places = self._places(selector, *(start + (end - start) * step / 8 for step in range(9)))
        for step, (x, y) in enumerate(places):
            point = {"x": x, "y": y + down * step / 8}
            self.call("Input.dispatchTouchEvent", type="touchMove" if step else "touchStart", touchPoints=[point])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def _places(self, selector: str, *shares: float) -> list[tuple[float, float]]:
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.scrollIntoView({{block: 'center'}})")
        x, y, width, height = self.run(f"Object.values({found}.getBoundingClientRect().toJSON())")[:4]
        return [(x + share * width, y + height / 2) for share in shares]

    def screenshot(self, path: Path) -> None:
        """What is seen, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def chromium(folder: Path, *options: str) -> Iterator[Page]:
    """A browser with a profile of its own in `folder`."""
    assert CHROMIUM is not None
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()
    arguments = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
    arguments += ["--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage", "--lang=en", *options]
    arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
    shell = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
    process = subprocess.Popen(
        ["bash", "-c", shell, CHROMIUM, *arguments],
        pass_fds=(read_commands, write_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Page(commands, answers)
    finally:
        os.close(commands)  # ends the browser
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        os.close(answers)
