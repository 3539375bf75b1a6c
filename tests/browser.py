"""A headless Chromium over its DevTools protocol: enough of it to use a page as a person does.

`python -m tests.browser http://127.0.0.1:8000/ serve/page/screenshot.webp` photographs the page of
a running endpoint, once it has drawn.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

PATIENCE = 30.0
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The browser's program, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def running_browser() -> Iterator[int]:
    """A browser with a profile of its own; yields the port of its DevTools."""
    program = chromium()
    assert program is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        options += ["--disable-dev-shm-usage", "--disable-background-networking"]
        options += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        process = subprocess.Popen(
            [program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            for line in process.stderr:
                # The file that says it too is written a moment later.
                found = re.match(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", line)
                if found:
                    break
            else:
                raise AssertionError("the browser did not start")
            yield int(found[1])
        finally:
            process.terminate()
            process.wait(20)
            if process.stderr is not None:
                process.stderr.close()


class Page:
    """One tab. `problems` collects what the page complained of, `asked` the URLs it asked for."""

    def __init__(self, socket: Any) -> None:
        self.problems: list[str] = []
        self.asked: list[str] = []
        self._socket = socket
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def listen(self) -> None:
        """Takes what the browser sends, until it is closed."""
        async for message in self._socket:
            told = message.json()
            if "id" in told:
                self._waiting.pop(told["id"]).set_result(told)
            elif told["method"] == "Runtime.exceptionThrown":
                self.problems.append(str(told["params"]["exceptionDetails"]))
            elif told["method"] == "Log.entryAdded":
                entry = told["params"]["entry"]
                # That a request was refused is told there too; the page's part is to say it kindly.
                if entry["level"] == "error" and entry.get("source") != "network":
                    self.problems.append(str(entry))
            elif told["method"] == "Network.requestWillBeSent":
                self.asked.append(told["params"]["request"]["url"])

    async def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command; returns its result."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        told = await asyncio.wait_for(answer, PATIENCE)
        assert "error" not in told, told
        return told["result"]

    async def see(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        told = await self.tell(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, expression: str) -> None:
        """Waits until an expression is true."""
        end = asyncio.get_running_loop().time() + PATIENCE
        while not await self.see(f"!!({expression})"):
            assert asyncio.get_running_loop().time() < end, await self.see(
                "document.body.innerText"
            )
            await asyncio.sleep(0.02)

    async def write(self, element: str, text: str) -> None:
        """Types into an element, in place of what it held."""
        await self.see(f"document.querySelector({element!r}).focus()")
        await self.see(f"document.querySelector({element!r}).select()")
        await self.tell("Input.insertText", text=text)

    async def press(self, key: str, code: int, text: str = "") -> None:
        """Presses a key."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        down: dict[str, Any] = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        await self.tell("Input.dispatchKeyEvent", **common, **down)
        await self.tell("Input.dispatchKeyEvent", type="keyUp", **common)

    async def screen(self, width: int, height: int, *, dark: bool = False) -> None:
        """Sets the size of the window and the colours that the person prefers."""
        await self.tell(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.tell("Emulation.setEmulatedMedia", features=[scheme])

    async def photograph(self, quality: int = 80) -> bytes:
        """The window as a WebP file."""
        told = await self.tell("Page.captureScreenshot", format="webp", quality=quality)
        return base64.b64decode(told["data"])


@asynccontextmanager
async def opened(port: int, url: str) -> AsyncIterator[Page]:
    """A new tab on a page."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
            target = await answer.json(content_type=None)
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = Page(socket)
            listening = asyncio.create_task(page.listen())
            for domain in ("Runtime", "Log", "Network", "Page"):
                await page.tell(f"{domain}.enable")
            await page.tell("Page.navigate", url=url)
            await page.until(f"location.href == {url!r} && document.readyState == 'complete'")
            try:
                yield page
            finally:
                await page.tell("Page.close")
                listening.cancel()


LARGEST = 60_000  # bytes of a photograph


async def photograph_page(port: int, url: str) -> bytes:
    """The endpoint's page with a picture on it, as a WebP file of at most `LARGEST` bytes."""
    async with opened(port, url) as page:
        await page.screen(1100, 1060)
        await page.until("document.querySelector('#picture').naturalWidth > 0")
        shown = [image async for image in _ever_smaller(page)]
    return shown[-1]


async def _ever_smaller(page: Page) -> AsyncIterator[bytes]:
    for quality in range(85, 15, -10):
        image = await page.photograph(quality)
        yield image
        if len(image) <= LARGEST:
            return
    raise AssertionError(f"the page makes more than {LARGEST} bytes")


if __name__ == "__main__":
    with running_browser() as its_port:
        Path(sys.argv[2]).write_bytes(asyncio.run(photograph_page(its_port, sys.argv[1])))
