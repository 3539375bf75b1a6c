"""The page at `/`, and what it asks for: concepts' cards and previews."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serve.auth import ApiKeys, key_digest
from serve.page import PAGE_PATHS
from tests.unit.serve.test_serve_gateway import Run, World, refused, run
from tests.unit.serve.world import BASE, Shelf

__all__ = ["run"]

KEY = "sk-echodistill-" + "k" * 40
PNG = b"\x89PNG\r\n\x1a\n and the rest"


def with_preview(shelf: Shelf, concept: str, seed: int, data: bytes) -> None:
    shelf.add(concept, seed)
    place = shelf.folder / f"{concept}-{seed}" / "artifacts" / "adapter" / "preview.png"
    place.write_bytes(data)


def test_the_page_needs_no_key_and_what_it_asks_for_does(run: Run) -> None:
    async def use(world: World) -> None:
        for path in PAGE_PATHS:
            answer = await world.client.get(path)
            assert answer.status_code == 200, path
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in ("/v1/models", "/v1/concepts/dog", "/v1/concepts/dog/preview"):
            refused(await world.client.get(path), 401, "invalid_api_key")
        answer = await world.client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200

    run(use, keys=ApiKeys({key_digest(KEY): "ada"}))


def test_the_page_loads_nothing_from_elsewhere(run: Run) -> None:
    async def use(world: World) -> None:
        page = (await world.client.get("/")).text
        assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:,", "page.css", "page.js"}
        for path in PAGE_PATHS:
            assert "//" not in re.sub(
                r"(?m)^\s*//.*$|; //.*$", "", (await world.client.get(path)).text
            )

    run(use)


def test_a_concepts_card_tells_its_versions(run: Run, shelf: Shelf) -> None:
    words = {"class_noun": "dog", "token": "<new1>", "metric.clip_i": "0.5", "metric.bad": "nan"}
    first, sha256 = shelf.add("ada-dog", 1, tags=words)
    second, _ = shelf.add("ada-dog", 2, alias="candidate", tags={"class_noun": "cat"})

    async def use(world: World) -> None:
        card = (await world.client.get("/v1/concepts/ada-dog")).json()
        assert (card["id"], card["class_noun"], card["token"]) == ("ada-dog", "dog", "<new1>")
        assert (card["base"], card["size"], card["champion"]) == (BASE, "32x32", first)
        assert [each["version"] for each in card["versions"]] == [second, first]
        assert [each["aliases"] for each in card["versions"]] == [["candidate"], ["champion"]]
        assert card["versions"][1]["adapter_sha256"] == sha256
        assert card["versions"][1]["metrics"] == {"clip_i": 0.5}

    run(use)


@pytest.mark.parametrize("name", ["nobody", BASE, "ada@1", "Ada", "%2e%2e", "a" * 70])
def test_what_is_no_concept_has_no_card_and_no_preview(run: Run, name: str) -> None:
    async def use(world: World) -> None:
        for path in (f"/v1/concepts/{name}", f"/v1/concepts/{name}/preview"):
            refused(await world.client.get(path), 404, "model_not_found", "model")

    run(use)


def test_a_preview_is_the_champions_own_and_a_png(run: Run, shelf: Shelf) -> None:
    with_preview(shelf, "dog", 1, PNG)
    with_preview(shelf, "cat", 2, b"<script>alert(1)</script>")
    shelf.add("bird", 3)
    shelf.add("fish", 4, alias=None)

    async def use(world: World) -> None:
        answer = await world.client.get("/v1/concepts/dog/preview")
        assert (answer.content, answer.headers["content-type"]) == (PNG, "image/png")
        for name in ("cat", "bird"):
            told = refused(
                await world.client.get(f"/v1/concepts/{name}/preview"),
                404,
                "model_not_found",
                "model",
            )
            assert "no preview" in told
        told = refused(
            await world.client.get("/v1/concepts/fish/preview"), 404, "model_not_found", "model"
        )
        assert "no such concept has a champion" in told

    run(use)


def test_the_pages_files_are_part_of_the_package() -> None:
    page = Path(__file__).parents[3] / "serve" / "page"
    assert {"index.html", "page.css", "page.js"} <= {path.name for path in page.iterdir()}
