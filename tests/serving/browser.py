"""A real headless Chromium for tests, over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from sora.core.processes import start_child
from tests import programs

CHROMIUM = programs.find("chromium")
_KEYS = {
    "Tab": {"windowsVirtualKeyCode": 9, "code": "Tab", "key": "Tab"},
    "Enter": {"windowsVirtualKeyCode": 13, "code": "Enter", "key": "Enter", "text": "\r"},
    "Space": {"windowsVirtualKeyCode": 32, "code": "Space", "key": " ", "text": " "},
    "ArrowDown": {"windowsVirtualKeyCode": 40, "code": "ArrowDown", "key": "ArrowDown"},
}


class Browser:
    """One tab. `requested` has every address that it asked, `complaints` what its console said."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._number = 0
        self._events: list[dict[str, Any]] = []
        self.requested: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._line.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._line.recv(timeout=60))
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        kind, told = event.get("method"), event.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requested.append(told["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"])[:500])
        elif kind == "Log.entryAdded":
            self.complaints.append(f"{told['entry']['source']}: {told['entry']['text']}")
        self._events.append(event)

    def event(self, method: str, seconds: float = 20) -> dict[str, Any]:
        """The next event of this kind that was not taken yet."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for number, event in enumerate(self._events):
                if event["method"] == method:
                    del self._events[number]
                    told: dict[str, Any] = event["params"]
                    return told
            self.js("0")  # whatever came meanwhile is noted
            time.sleep(0.05)
        raise AssertionError(f"no {method} within {seconds} s")

    def open(self, address: str) -> None:
        self._events.clear()
        self.call("Page.navigate", url=address)
        self.event("Page.loadEventFired")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.js(expression)
            if value:
                return value
            time.sleep(0.05)
        text = self.js("document.body.innerText")
        raise AssertionError(f"{expression} not within {seconds} s: {text}\n{self.complaints}")

    def press(self, key: str) -> None:
        """A key as a person presses it."""
        self.call("Input.dispatchKeyEvent", type="keyDown", **_KEYS[key])
        self.call("Input.dispatchKeyEvent", type="keyUp", **{k: v for k, v in _KEYS[key].items() if k != "text"})

    def tab_to(self, condition: str, most: int = 40) -> None:
        """Presses Tab until `condition`, in which `it` is the focused element, is true."""
        for _ in range(most):
            self.press("Tab")
            if self.js(f"(it => Boolean({condition}))(document.activeElement)"):
                return
        raise AssertionError(f"Tab does not reach {condition}")

    def give_file(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def look(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screen(self, file: Path, *, whole: bool = True) -> None:
        """A PNG of the page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A Chromium with a profile in `folder`, a made-up camera, and no way to any address but this machine's."""
    assert CHROMIUM is not None
    profile = folder / "profile"
    command = [
        CHROMIUM, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run",
        "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--disable-extensions", "--mute-audio", "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        "about:blank",
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "chromium.log").open("ab") as log:
        child = start_child(command, stdout=log, stderr=log)
    try:
        port = _port(profile / "DevToolsActivePort", child)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            tabs = client.get("/json/list").json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, max_size=None, proxy=None) as line:
            yield Browser(line)
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _port(file: Path, child: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert child.poll() is None, "Chromium ended at its start"
        if file.is_file() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.05)
    raise AssertionError("Chromium did not open its DevTools port within 60 s")
