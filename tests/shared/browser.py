"""A Chromium that is driven through a pipe, for tests of pages: no driver and no package is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from house_plan import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

#: Contrast of every text with what is behind it, by the formula of WCAG 2.
CONTRAST = """
(() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (rgb(c)[3] > 0) return c; } return getComputedStyle(document.documentElement).colorScheme && "Canvas"; };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    const hidden = ["SCRIPT", "STYLE", "NOSCRIPT"].includes(e.tagName) || !e.checkVisibility();
    if (hidden || !walk.currentNode.data.trim()) continue;
    const svg = e.closest("svg");
    const one = light(rgb(getComputedStyle(e)[svg ? "fill" : "color"])), other = light(rgb(behind(e)));
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${e.tagName}: ${walk.currentNode.data.trim().slice(0, 40)}`);
  }
  return found;
})()
"""


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. ``errors`` are those of its console, ``requests`` all addresses it asked for."""

    def __init__(self) -> None:
        program = find_browser()
        assert program is not None
        self._profile = tempfile.mkdtemp(prefix="crp-browser-")
        read_there, self._write = os.pipe()
        self._read, write_there = os.pipe()

        def descriptors() -> None:
            # The browser reads from 3 and writes to 4; both may be in use before.
            one, other = os.dup(read_there), os.dup(write_there)
            os.dup2(one, 3)
            os.dup2(other, 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [program, *options, f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=descriptors,
            close_fds=False,
        )
        os.close(read_there)
        os.close(write_there)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, address: str) -> None:
        """Load a page, and wait until it is there with its pictures."""
        self.errors.clear()
        self.requests.clear()
        self._loaded = False
        self.call("Page.navigate", url=address)
        while not self._loaded:
            self._next()
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def evaluate(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"].get("exception", {}).get("description", str(result)))
        return result["result"].get("value")

    def resize(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def allow_scripts(self, allowed: bool) -> None:
        self.call("Emulation.setScriptExecutionDisabled", value=not allowed)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 16)
            if not part:
                raise RuntimeError("the browser has ended")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.errors.append(str(parameters["args"]))
        return message


def visit_all(browser: Browser, atlas: Path) -> None:
    """Open all pages of an atlas: no errors, no request but to its own folder, and links from each to each that is."""
    pages, seen = sorted(atlas.rglob("*.html")), set()
    browser.resize(1280)
    for page in pages:
        browser.open(page.as_uri())
        assert browser.errors == [], page
        for address in browser.requests:
            path = Path(unquote(urlparse(address).path))
            assert address.startswith("file:") and path.is_relative_to(atlas) and path.is_file(), (page, address)
        links = browser.evaluate(
            "[...document.querySelectorAll('a[href], image[href]')].map(a => a.href.baseVal ?? a.href)"
        )
        for link in links:
            target = (page.parent / unquote(urlparse(link).path)).resolve()
            assert not link.strip() or target.is_file(), (page, link)
            seen.add(target)
        assert browser.evaluate("document.querySelectorAll('main h1').length") == 1
        assert browser.evaluate("[...document.images].every(one => one.hasAttribute('alt'))")
    assert set(pages) - seen - {atlas / "search.html"} == set(), "every page can be reached"


#: The script of axe-core: where the variable CRP_AXE says, or where ``npm install axe-core`` puts it.
AXE = Path(os.environ.get("CRP_AXE") or ROOT / "node_modules" / "axe-core" / "axe.min.js")
needs_axe = pytest.mark.skipif(not AXE.is_file(), reason="no axe-core: npm install axe-core")


def broken_rules(browser: Browser) -> list[list[str]]:
    """Rules of axe-core that the open page breaks, each with an element."""
    browser.evaluate(AXE.read_text() + ";0")
    broken = "axe.run().then(found => found.violations.map(one => [one.id, one.nodes[0].html.slice(0, 200)]))"
    found: list[list[str]] = browser.evaluate(broken)
    return found


def one_of_each_kind(atlas: Path) -> list[Path]:
    """Pages of an atlas's folder itself, and one of each folder in it."""
    folders = [path for path in sorted(atlas.iterdir()) if path.is_dir() and any(path.rglob("*.html"))]
    return [*sorted(atlas.glob("*.html")), *(min(path.rglob("*.html")) for path in folders)]
