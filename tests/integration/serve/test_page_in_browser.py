"""The page at `/` used in a real browser, over the real application; needs Chromium."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn

from serve.auth import ApiKeys, key_digest
from serve.gateway import make_http
from serve.settings import load_settings
from tests.browser import Page, chromium, opened, running_browser
from tests.unit.serve.test_serve_gateway import Here
from tests.unit.serve.world import BASE, Shelf

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(chromium() is None, reason="chromium is not installed: make system-deps"),
]

WORDS = {"class_noun": "dog", "token": "<new1>"}
KEY = "sk-echodistill-" + "k" * 40
PIXELS = """(() => {
  const canvas = document.createElement('canvas'), image = document.querySelector('#picture');
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  canvas.getContext('2d').drawImage(image, 0, 0);
  return canvas.toDataURL();
})()"""
FACTS = "document.querySelector('#facts').innerText"
DRAWN = f"document.querySelector('#picture').naturalWidth > 0 && {FACTS}"


@pytest.fixture(scope="module")
def browser() -> Iterator[int]:
    with running_browser() as port:
        yield port


Use = Callable[[Page, Here], Awaitable[None]]
Visit = Callable[..., None]


@asynccontextmanager
async def served(here: Here, shelf: Shelf, folder: Path, keys: ApiKeys) -> AsyncIterator[str]:
    settings = load_settings(
        base=BASE,
        student=folder,
        tracking_uri=shelf.tracking_uri,
        cache=folder / "cache",
        access_log=folder / "access.log",
    )
    app = make_http(here, settings, keys)
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="error"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    await serving


@pytest.fixture
def visit(browser: int, shelf: Shelf, tmp_path: Path) -> Visit:
    """Runs a coroutine with the page open; afterwards the page must not have complained."""

    def visitor(use: Use, keys: ApiKeys | None = None) -> None:
        async def whole() -> None:
            here = Here(shelf, load_settings(base=BASE, student=tmp_path, cache=tmp_path / "cache"))
            async with (
                served(here, shelf, tmp_path, keys or ApiKeys()) as url,
                opened(browser, url) as page,
            ):
                await use(page, here)
                assert page.problems == []
                own = (url, "blob:", "data:")
                assert page.asked and all(asked.startswith(own) for asked in page.asked)

        asyncio.run(whole())

    return visitor


def test_typing_changes_the_picture(visit: Visit, shelf: Shelf) -> None:
    _, sha256 = shelf.add("rex", 1, tags=WORDS)
    shelf.add("tom", 2, tags=WORDS)

    async def use(page: Page, _: Here) -> None:
        await page.until(f"{DRAWN}.includes('rex@1')")
        cards = await page.see("[...document.querySelectorAll('.card')].map(c => c.dataset.id)")
        assert cards == ["rex", "tom", BASE]
        facts, first = await page.see(FACTS), await page.see(PIXELS)
        assert sha256 in facts
        await page.write("#prompt", "the red dog in the snow")
        await page.until(f"{DRAWN}.includes('in the snow')")
        second = await page.see(PIXELS)
        assert second != first
        await page.write("#seed", "7")
        await page.until(f"/seed\\s+7/.test({FACTS})")
        await page.until(f"{PIXELS} !== {second!r}")
        # The download is the picture that is shown.
        assert await page.see("document.querySelector('#download').download") == "rex-1-seed7.png"
        assert await page.see("document.querySelector('#download').href") == await page.see(
            "document.querySelector('#picture').src"
        )

    visit(use)


def test_errors_are_told_kindly_and_the_picture_stays(visit: Visit, shelf: Shelf) -> None:
    shelf.add("rex", 1, tags=WORDS)

    async def use(page: Page, here: Here) -> None:
        status = "document.querySelector('#status')"
        await page.until(f"{DRAWN}.includes('rex@1')")
        await page.write("#prompt", "a photo of a cat")
        await page.until(f"{status}.classList.contains('wrong')")
        told = await page.see(f"{status}.textContent")
        assert "<new1>" in told and "dog" in told and "{" not in told
        assert await page.see(DRAWN)
        await page.write("#seed", "-1")
        await page.until(f"{status}.textContent.includes('whole number')")
        await page.write("#seed", "1")
        await page.write("#prompt", "a photo of a dog")
        await page.until(f"!{status}.classList.contains('wrong') && /seed\\s+1\\b/.test({FACTS})")
        here.trouble = RuntimeError("secret detail")
        await page.write("#prompt", "a photo of a red dog")
        await page.until(f"{status}.textContent.includes('Something went wrong')")
        assert "secret" not in await page.see("document.body.innerText")

    visit(use)


def test_a_key_is_asked_for_and_kept_in_the_page_alone(visit: Visit, shelf: Shelf) -> None:
    shelf.add("rex", 1, tags=WORDS)

    async def use(page: Page, _: Here) -> None:
        await page.until("!document.querySelector('#key').hidden")
        assert await page.see("document.querySelectorAll('.card').length") == 0
        for key, done in (
            ("wrong", "document.querySelector('#status').textContent.includes('Incorrect')"),
            (KEY, f"{DRAWN}.includes('rex@1')"),
        ):
            await page.write("#key-text", key)
            await page.press("Enter", 13, "\r")
            await page.until(done)
        assert await page.see("document.querySelector('#key').hidden")
        assert KEY not in await page.see("JSON.stringify([{...localStorage}, document.cookie])")

    visit(use, ApiKeys({key_digest(KEY): "ada"}))


def test_keyboard_dark_colours_and_a_phone(visit: Visit, shelf: Shelf) -> None:
    shelf.add("rex", 1, tags=WORDS)
    shelf.add("tom", 2, tags=WORDS)

    async def use(page: Page, _: Here) -> None:
        await page.until(f"{DRAWN}.includes('rex@1')")
        await page.see("document.querySelector('.card input').focus()")
        await page.press("ArrowRight", 39)
        await page.until(f"{DRAWN}.includes('tom@1')")
        paper = "getComputedStyle(document.body).backgroundColor"
        await page.screen(1200, 800)
        light = await page.see(paper)
        await page.screen(360, 740, dark=True)
        assert await page.see(paper) != light
        assert await page.see("document.documentElement.scrollWidth") <= 360

    visit(use)
