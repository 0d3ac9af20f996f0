"""A real browser for the tests: the machine's own Chromium, spoken to by its DevTools protocol."""

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""Where it is; None where this machine has none."""


class Browser:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        """What the browser says against pages: scripts that fail, what a policy forbids, what is not there."""

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call the browser."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                entry = message["params"]["entry"]
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")
            if message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(message["params"]["exceptionDetails"]))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    async def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        answer = await self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def wait_for(self, script: str) -> None:
        """Wait until an expression in the page is true."""
        for _ in range(600):
            with contextlib.suppress(AssertionError):  # the page may be changing
                if await self.run(script):
                    return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never true: {script}; {await self.run('document.body.innerText')}")

    async def open(self, url: str) -> None:
        """Go to an address."""
        await self.ask("Page.navigate", url=url)
        await self.wait_for(
            f"location.href.startsWith({url!r}.split('/').slice(0, 3).join('/')) && document.readyState == 'complete'"
        )

    async def picture(self, path: Path) -> None:
        """Write what is seen."""
        picture = await self.ask("Page.captureScreenshot", format="png")
        await asyncio.to_thread(path.write_bytes, base64.b64decode(picture["data"]))


@contextlib.asynccontextmanager
async def browse(directory: Path) -> AsyncIterator[Browser]:
    """Run a browser until the block ends.

    Args:
        directory: of its profile; empty.
    """
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,820"]
    options += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={directory}"]
    command = [CHROMIUM, *options, "--remote-debugging-port=0", "--remote-allow-origins=*", "about:blank"]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
    try:
        active = directory / "DevToolsActivePort"
        for _ in range(1200):
            if active.exists() and active.read_text().count("\n"):
                break
            await asyncio.sleep(0.05)
        port = active.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (page,) = [each for each in await answer.json() if each["type"] == "page"]
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                browser = Browser(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await browser.ask(f"{domain}.enable")
                yield browser
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 30)
