"""A headless Chromium that a test drives over its debugging protocol."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import urllib.request

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
websocket = pytest.importorskip("websocket", reason="needs websocket-client")


class Page:
    """One tab. `problems` are errors on the console and exceptions; network requests are in
    `requests`.
    """

    def __init__(self, address):
        self.socket, self.numbers = (
            websocket.create_connection(address, timeout=60),
            itertools.count(1),
        )
        self.problems, self.requests = [], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        return self.until(lambda message: message.get("id") == number)["result"]

    def until(self, wanted):
        while True:
            message = json.loads(self.socket.recv())
            method, found = message.get("method"), message.get("params", {})
            if method == "Runtime.exceptionThrown" or (
                method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning")
            ):
                self.problems.append(found)
            if method == "Network.requestWillBeSent":
                self.requests.append(found["request"]["url"])
            if wanted(message):
                return message

    def open(self, place, width=1280, height=900, dark=False, scripts=True):
        """Open an address or a file, and wait until it is loaded."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=place if isinstance(place, str) else place.as_uri())
        self.until(lambda message: message.get("method") == "Page.loadEventFired")

    def ask(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)[
            "result"
        ].get("value")

    def screenshot(self, path):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(folder):
    """Start Chromium with a profile in `folder`, and end it."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
        "--remote-allow-origins=*",
    ]
    command = [CHROMIUM, *options, f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines = (
                line for line in process.stderr if line.startswith("DevTools listening on ws://")
            )
            host = next(lines).split("/")[2]
            with urllib.request.urlopen(f"http://{host}/json/list") as answer:
                tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
            page = Page(tab["webSocketDebuggerUrl"])
            with contextlib.closing(page.socket):
                yield page
        finally:
            process.terminate()
