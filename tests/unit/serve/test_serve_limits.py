"""What keys may do: which concepts they may know of, and how many pictures a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import InputError
from serve.api import ApiError
from serve.auth import ApiKeys, key_digest, new_key, read_keys
from serve.limits import Allowance, Limits, parse_limits
from serve.settings import load_settings
from tests.unit.serve.test_serve_gateway import PROMPT, Run, World, refused, run
from tests.unit.serve.world import BASE, Shelf

__all__ = ["run"]

ANN, BOB = "a" * 30, "b" * 30


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def keys(**limits: Limits) -> ApiKeys:
    return ApiKeys({key_digest(ANN): "ann", key_digest(BOB): "bob"}, limits)


def test_limits_of_a_key_file(tmp_path: Path) -> None:
    (_, ann), (_, bob) = new_key("ann"), new_key("bob")
    file = tmp_path / "keys.txt"
    file.write_text(f"{ann} concepts=rex,team-*  pictures_per_minute=60\n{bob}\n")
    limits = read_keys(load_settings(api_keys_file=file)).limits
    assert limits["ann"] == Limits(("rex", "team-*"), 60)
    assert limits["bob"] == Limits()
    for concept, allowed in (("rex", True), ("team-a", True), ("team", False), ("rex2", False)):
        assert limits["ann"].allow(concept) is allowed
    file.write_text(f"{ann} concepts=rex\n{new_key('ann')[1]}\n")
    with pytest.raises(InputError, match="line 2 .* other limits"):
        read_keys(load_settings(api_keys_file=file))


@pytest.mark.parametrize(
    "word", ["concepts=", "concepts=A", "concepts=a,,b", "pictures_per_minute=0",
             "pictures_per_minute=-1", "pictures_per_minute=9999999999", "admin=yes", "rex"],
)  # fmt: skip
def test_wrong_limit_is_named_by_its_place(word: str) -> None:
    with pytest.raises(InputError, match="line 3 has a wrong limit"):
        parse_limits([word], "line 3")


def test_an_allowance_fills_up_to_a_minutes_worth() -> None:
    now = 0.0
    allowance, sixty = Allowance(lambda: now), Limits(per_minute=60)
    allowance.take("ann", sixty, 60)
    allowance.take("bob", sixty, 60)  # each key has its own
    with pytest.raises(ApiError) as caught:
        allowance.take("ann", sixty, 2)
    assert (caught.value.status, caught.value.retry_after) == (429, 2)
    now = 2.0
    allowance.take("ann", sixty, 2)
    now = 1000.0
    allowance.take("ann", sixty, 60)
    with pytest.raises(ApiError):
        allowance.take("ann", sixty, 1)
    with pytest.raises(ApiError, match="fewer at a time"):
        allowance.take("eve", Limits(per_minute=2), 3)
    for _ in range(100):
        allowance.take("eve", Limits(), 10)


def test_a_key_knows_of_its_own_concepts_only(run: Run, shelf: Shelf) -> None:
    _, sha256 = shelf.add("rex", 1)
    shelf.add("tom", 2)

    async def use(world: World) -> None:
        ann, bob = bearer(ANN), bearer(BOB)
        for model in ("tom", "tom@1", "tom@champion"):
            answers = []
            for name in (model, model.replace("tom", "nix")):
                body = {"prompt": PROMPT, "model": name}
                answer = await world.client.post("/v1/images/generations", json=body, headers=ann)
                answers.append(refused(answer, 404, "model_not_found", "model"))
            # What is forbidden looks like what is not there.
            assert answers[0].replace("tom", "nix") == answers[1]
        for path in ("/v1/concepts/tom", "/v1/concepts/tom/preview"):
            told = refused(
                await world.client.get(path, headers=ann), 404, "model_not_found", "model"
            )
            other = refused(
                await world.client.get(path.replace("tom", "nix"), headers=ann),
                *(404, "model_not_found", "model"),
            )
            assert told.replace("tom", "nix") == other
        listed = (await world.client.get("/v1/models", headers=ann)).json()["data"]
        assert [each["id"] for each in listed] == [BASE, "rex"]
        listed = (await world.client.get("/v1/models", headers=bob)).json()["data"]
        assert [each["id"] for each in listed] == [BASE, "rex", "tom"]
        for model, expected in (("rex", sha256), (BASE, None)):
            body = {"prompt": PROMPT, "model": model}
            answer = await world.client.post("/v1/images/generations", json=body, headers=ann)
            assert answer.json()["adapter_sha256"] == expected

    run(use, keys=keys(ann=Limits(("rex",))))


def test_a_key_over_its_rate_is_told_when_to_come_back(run: Run) -> None:
    async def use(world: World) -> None:
        async def ask(key: str, n: int) -> object:
            body = {"prompt": PROMPT, "n": n}
            return await world.client.post("/v1/images/generations", json=body, headers=bearer(key))

        assert (await ask(ANN, 2)).status_code == 200  # type: ignore[attr-defined]
        answer = await ask(ANN, 2)
        refused(answer, 429, "rate_limit_exceeded")  # type: ignore[arg-type]
        assert int(answer.headers["retry-after"]) >= 1  # type: ignore[attr-defined]
        assert (await ask(BOB, 2)).status_code == 200  # type: ignore[attr-defined]

    run(use, keys=keys(ann=Limits(per_minute=3)))


def test_models_come_in_pages(run: Run, shelf: Shelf) -> None:
    for seed, concept in enumerate(("a", "b", "c")):
        shelf.add(concept, seed)

    async def use(world: World) -> None:
        seen: list[str] = []
        more = True
        while more:
            asked = {"limit": "2", **({"after": seen[-1]} if seen else {})}
            page = (await world.client.get("/v1/models", params=asked)).json()
            seen += [each["id"] for each in page["data"]]
            more = page["has_more"]
            assert len(page["data"]) <= 2
        assert seen == [BASE, "a", "b", "c"]
        page = (await world.client.get("/v1/models", params={"after": "bb"})).json()
        assert [each["id"] for each in page["data"]] == ["c"]  # a concept that is gone by now
        for wrong in ("0", "1001", "x"):
            answer = await world.client.get("/v1/models", params={"limit": wrong})
            refused(answer, 400, "invalid_value", "limit")

    run(use)
