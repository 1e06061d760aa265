"""A headless Chromium for tests, spoken to over its debugging pipe: what a page shows, logs and asks of the network."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
PATIENCE = 60.0
"""Seconds that an answer may take on a busy machine."""


def find() -> str | None:
    """Return the path of a Chromium, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Tab:
    """A page of a running browser: the ends of its pipe, and what it has told without being asked."""

    to: int
    back: int
    buffer: bytes = b""
    number: int = 0
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """Ask something of the browser and return its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": given}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def read(self) -> dict[str, Any]:
        """Return the next message."""
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.back], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self.back, 1 << 20)
            assert piece, "the browser has ended"
            self.buffer += piece
        first, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(first))

    def open(self, page: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Load a page anew, at a width in CSS pixels and under a colour scheme, and wait until it is there."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.go("about:blank")  # so that the same page is loaded anew, whatever stands after its #
        self.go(page.as_uri())

    def go(self, address: str) -> None:
        """Load an address and wait until it is there."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        given = {"key": key, "code": key, "windowsVirtualKeyCode": {"Enter": 13, "Tab": 9}[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", text={"Enter": "\r"}.get(key, ""), **given)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        self.call("Input.insertText", text=text)

    def screenshot(self, selector: str | None = None, path: Path | None = None) -> NDArray[np.float64]:
        """Return what is seen of an element, or of the window: height x width x RGB, from 0 to 1."""
        from matplotlib import image

        given: dict[str, Any] = {}
        if selector is not None:
            box = self.evaluate(
                f"(() => {{ const at = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); return "
                "{x: at.x + scrollX, y: at.y + scrollY, width: at.width, height: at.height, scale: 1}; })()"
            )
            given = {"clip": box, "captureBeyondViewport": True}
        png = base64.b64decode(self.call("Page.captureScreenshot", format="png", **given)["data"])
        if path is not None:
            path.write_bytes(png)
        pixels: NDArray[np.float64] = image.imread(io.BytesIO(png))[..., :3]
        return pixels

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the page so far."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        self.evaluate("0")  # whatever happened before has arrived then
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    @property
    def requests(self) -> list[str]:
        """Addresses that the page has asked for since it was opened."""
        self.evaluate("0")
        asked = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [str(event["params"]["request"]["url"]) for event in asked]


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """Start a browser with a profile of its own in a folder, and end it."""
    program = find()
    assert program is not None
    hears, to = os.pipe()
    back, says = os.pipe()
    words = [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    # The pipe has to be at descriptors 3 and 4, which only a shell can see to without a race.
    command = ["bash", "-c", f'exec "$@" 3<&{hears} 4>&{says}', "bash", *words]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, pass_fds=(hears, says), stdout=log, stderr=log)
    os.close(hears)
    os.close(says)
    try:
        tab = Tab(to, back)
        target = tab.call("Target.createTarget", url="about:blank")["targetId"]
        tab.session = tab.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        yield tab
    finally:
        process.terminate()
        process.wait(PATIENCE)
        os.close(to)
        os.close(back)
