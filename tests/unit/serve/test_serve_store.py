from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from model.adapter import save_adapter
from model.adapter_meta import AdapterInfo
from model.errors import ServiceError
from serve.endpoint import free_port
from serve.engine import Engine, adapter_bytes
from serve.lru import ByteLru, SingleFlight
from serve.pointers import Pointers
from serve.registry import BadVersionError, Listed, Pinned, Registry
from serve.store import AdapterStore
from tests.unit.serve.world import Shelf


class Door:
    """A registry with a door: shut, it is out of reach; held, it does not answer. It counts."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.shut = False
        self.held = threading.Event()
        self.held.set()
        self.finds = 0
        self.downloads = 0

    def _pass(self) -> None:
        self.held.wait()
        if self.shut:
            raise ServiceError("the registry is shut")

    def find(self, concept: str, pointer: str) -> Pinned | None:
        self.finds += 1
        self._pass()
        return self.registry.find(concept, pointer)

    def concepts(self) -> list[Listed]:
        self._pass()
        return self.registry.concepts()

    def download(self, pinned: Pinned, folder: Path) -> Path:
        self.downloads += 1
        self._pass()
        return self.registry.download(pinned, folder)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def door(shelf: Shelf) -> Door:
    return Door(Registry(shelf.tracking_uri))


def make_store(shelf: Shelf, source: Any, cache: Path, **options: Any) -> AdapterStore:
    given = {"base_hash": shelf.pair.hash, "memory_bytes": 2**30, **options}
    return AdapterStore(source, cache, check=Engine(shelf.pair).check, **given)


def make_pointers(door: Door, clock: Clock, **options: Any) -> Pointers:
    given = {"alias_seconds": 2.0, "registry_seconds": 30.0, **options}
    return Pointers(door, clock=clock, **given)


def pinned(pointers: Pointers, concept: str, pointer: str = "champion") -> Pinned:
    found = pointers.resolve(concept, pointer)
    assert found is not None
    return found


def test_registry_reads_aliases_versions_and_lists(shelf: Shelf) -> None:
    registry = Registry(shelf.tracking_uri)
    assert registry.concepts() == []
    first, sha_1 = shelf.add("dog", 1)
    second, sha_2 = shelf.add("dog", 2, alias="candidate")
    shelf.add("cat", 3, alias="candidate")
    assert registry.find("dog", "champion") == Pinned("dog", first, sha_1, shelf.pair.hash)
    assert registry.find("dog", "candidate") == Pinned("dog", second, sha_2, shelf.pair.hash)
    assert registry.find("dog", second) == Pinned("dog", second, sha_2, shelf.pair.hash)
    for pointer in ("99", "9" * 40, "0", "none", "v1", "-1"):
        assert registry.find("dog", pointer) is None
    assert registry.find("wolf", "champion") is registry.find("wolf", "1") is None
    assert [(item.concept, item.champion) for item in registry.concepts()] == [("dog", first)]


def test_registry_that_was_never_written_is_empty_and_stays_unwritten(tmp_path: Path) -> None:
    path = tmp_path / "none.db"
    registry = Registry(f"sqlite:///{path}")
    assert registry.find("dog", "champion") is None and registry.concepts() == []
    assert not path.exists()


def test_registry_out_of_reach_is_one_sentence_without_passwords(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = Registry(f"http://user:secret@127.0.0.1:{free_port('127.0.0.1', 0)}")
    with pytest.raises(ServiceError, match="did not answer") as caught:
        registry.find("dog", "champion")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_version_without_proof_is_refused(shelf: Shelf) -> None:
    shelf.add("dog", 1, tags={"adapter_sha256": "../../etc/passwd"})
    shelf.add("cat", 1, tags={"base_hash": ""})
    for concept in ("dog", "cat"):
        with pytest.raises(BadVersionError, match="register it again"):
            Registry(shelf.tracking_uri).find(concept, "champion")


def test_adapter_comes_from_registry_then_memory_then_disk(
    shelf: Shelf, door: Door, tmp_path: Path
) -> None:
    _, sha256 = shelf.add("dog", 1, keep_teacher=True)
    version = pinned(make_pointers(door, Clock()), "dog")
    store = make_store(shelf, door, tmp_path / "cache")
    assert store.warm(version) is None
    adapter, level = store.adapter(version)
    assert (level, adapter.sha256, door.downloads) == ("registry", sha256, 1)
    assert adapter.teacher_delta is None
    again, level = store.adapter(version)
    assert again is adapter and level == "memory" and store.warm(version) is adapter
    other_process = make_store(shelf, door, tmp_path / "cache")
    other, level = other_process.adapter(version)
    assert (level, other.sha256, door.downloads) == ("disk", sha256, 1)
    left = [path.name for path in (tmp_path / "cache/adapters/dog").iterdir()]
    assert left == [sha256]


def test_concurrent_requests_fetch_an_adapter_once(
    shelf: Shelf, door: Door, tmp_path: Path
) -> None:
    shelf.add("dog", 1)
    version = pinned(make_pointers(door, Clock()), "dog")
    store = make_store(shelf, door, tmp_path / "cache")
    door.held.clear()
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(store.adapter, version) for _ in range(8)]
        door.held.set()
        adapters = {id(item.result()[0]) for item in asked}
    assert len(adapters) == 1 and door.downloads == 1


def test_failed_fetch_is_tried_again_and_leaves_nothing(
    shelf: Shelf, door: Door, tmp_path: Path
) -> None:
    shelf.add("dog", 1)
    version = pinned(make_pointers(door, Clock()), "dog")
    store = make_store(shelf, door, tmp_path / "cache")
    door.shut = True
    with pytest.raises(ServiceError):
        store.adapter(version)
    assert list((tmp_path / "cache/adapters/dog").iterdir()) == []
    door.shut = False
    assert store.adapter(version)[1] == "registry"


def test_memory_keeps_the_most_recently_used_within_its_budget(
    shelf: Shelf, door: Door, tmp_path: Path
) -> None:
    for n, concept in enumerate(("a", "b", "c")):
        shelf.add(concept, n)
    pointers = make_pointers(door, Clock())
    a, b, c = (pinned(pointers, concept) for concept in ("a", "b", "c"))
    size = adapter_bytes(make_store(shelf, door, tmp_path / "one").adapter(a)[0])
    store = make_store(shelf, door, tmp_path / "cache", memory_bytes=2 * size)
    for version in (a, b, a, c):
        store.adapter(version)
    assert store.warm(b) is None
    assert store.warm(a) is not None and store.warm(c) is not None
    assert store.adapter(b)[1] == "disk"


def test_damaged_cache_entry_is_fetched_again(shelf: Shelf, door: Door, tmp_path: Path) -> None:
    _, sha256 = shelf.add("dog", 1)
    version = pinned(make_pointers(door, Clock()), "dog")
    make_store(shelf, door, tmp_path / "cache").adapter(version)
    file = tmp_path / "cache/adapters/dog" / sha256 / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    adapter, level = make_store(shelf, door, tmp_path / "cache").adapter(version)
    assert (level, adapter.sha256, door.downloads) == ("registry", sha256, 2)


def test_adapter_that_is_not_what_its_tag_says_is_never_served(
    shelf: Shelf, door: Door, tmp_path: Path
) -> None:
    pointers = make_pointers(door, Clock())
    # The tag of another version; another concept's folder under its own right hash; another base.
    _, other = shelf.add("wolf", 9)
    shelf.add("dog", 1, tags={"adapter_sha256": other})
    shelf.add_folder("cat", shelf.folder / "wolf-9", other)
    shelf.add("fox", 2, tags={"base_hash": "1" * 64})
    store = make_store(shelf, door, tmp_path / "cache")
    store.adapter(pinned(pointers, "wolf"))
    for concept in ("dog", "cat"):
        with pytest.raises(BadVersionError, match="not the one its tags tell of"):
            store.adapter(pinned(pointers, concept))
        assert not any((tmp_path / "cache/adapters" / concept).iterdir())
    with pytest.raises(BadVersionError, match="another base"):
        store.adapter(pinned(pointers, "fox"))


def test_adapter_that_would_spoil_a_batch_is_never_served(
    shelf: Shelf, door: Door, tmp_path: Path
) -> None:
    model = shelf.folder / "dog-1"
    adapter = model / "artifacts" / "adapter"
    sha256 = save_adapter(
        adapter,
        pair=shelf.pair,
        info=AdapterInfo("dog", "dog", ("<new1>",)),
        student_kv=shelf.pair.student_kv,
        token_rows=torch.full((1, shelf.pair.student_kv.shape[1]), torch.nan),
    )
    shelf.add_folder("dog", model, sha256)
    store = make_store(shelf, door, tmp_path / "cache")
    with pytest.raises(BadVersionError):
        store.adapter(pinned(make_pointers(door, Clock()), "dog"))


def test_cache_that_cannot_be_written_is_one_sentence(
    shelf: Shelf, door: Door, tmp_path: Path
) -> None:
    shelf.add("dog", 1)
    (tmp_path / "cache").write_text("a file where the folder should be")
    store = make_store(shelf, door, tmp_path / "cache")
    with pytest.raises(ServiceError, match="cannot be written"):
        store.adapter(pinned(make_pointers(door, Clock()), "dog"))


def test_alias_is_believed_for_a_moment_then_asked_again(shelf: Shelf, door: Door) -> None:
    first, _ = shelf.add("dog", 1)
    clock = Clock()
    pointers = make_pointers(door, clock)
    assert pointers.known("dog", "champion") is None
    assert pinned(pointers, "dog").version == first
    second, _ = shelf.add("dog", 2)
    clock.now = 0.9
    assert pinned(pointers, "dog").version == first
    assert pointers.known("dog", "champion") == pinned(pointers, "dog")
    assert door.finds == 1
    clock.now = 2.0
    assert pointers.known("dog", "champion") is None
    assert pinned(pointers, "dog").version == second
    shelf.point("dog", "champion", first)
    clock.now = 4.0
    assert pinned(pointers, "dog").version == first


def test_who_asks_often_never_waits(shelf: Shelf, door: Door) -> None:
    first, _ = shelf.add("dog", 1)
    clock = Clock()
    pointers = make_pointers(door, clock)
    pinned(pointers, "dog")
    second, _ = shelf.add("dog", 2)
    door.held.clear()
    clock.now = 1.5
    try:
        for _ in range(20):  # the registry does not answer, and is asked once
            known = pointers.known("dog", "champion")
            assert known is not None and known.version == first
    finally:
        door.held.set()
    while (known := pointers.known("dog", "champion")) is None or known.version == first:
        pass  # its answer is on the way
    assert known.version == second and door.finds == 2
    clock.now = 3.4  # believed from the moment at which it was asked for
    assert pointers.known("dog", "champion") == known


def test_what_is_known_stands_while_the_registry_is_away(shelf: Shelf, door: Door) -> None:
    first, _ = shelf.add("dog", 1)
    clock = Clock()
    pointers = make_pointers(door, clock)
    pinned(pointers, "dog")
    assert [item.concept for item in pointers.concepts()] == ["dog"]
    second, _ = shelf.add("dog", 2)
    door.shut = True
    clock.now = 10.0
    assert pinned(pointers, "dog").version == first
    assert [item.champion for item in pointers.concepts()] == [first]
    assert pointers.registry_away
    with pytest.raises(ServiceError):
        pointers.resolve("cat", "champion")
    door.shut = False
    clock.now = 20.0
    # The first to ask after the silence does not wait; the answer is there for the next.
    pinned(pointers, "dog")
    while pointers.registry_away:
        pinned(pointers, "dog")
    assert pinned(pointers, "dog").version == second


def test_dead_registry_is_asked_seldom_and_waited_for_once(shelf: Shelf, door: Door) -> None:
    shelf.add("dog", 1)
    clock = Clock()
    pointers = make_pointers(door, clock, registry_seconds=600.0)
    pinned(pointers, "dog")
    door.shut = True
    clock.now = 10.0
    pinned(pointers, "dog")
    assert pointers.registry_away and door.finds == 2
    clock.now = 11.9
    assert pointers.known("dog", "champion") is not None
    door.held.clear()
    clock.now = 20.0
    try:
        pinned(pointers, "dog")  # would wait for ten minutes if it waited at all
    finally:
        door.held.set()


def test_slow_registry_holds_nobody_who_has_an_answer(shelf: Shelf, door: Door) -> None:
    first, _ = shelf.add("dog", 1)
    clock = Clock()
    pointers = make_pointers(door, clock, registry_seconds=0.05)
    pinned(pointers, "dog")
    door.held.clear()
    clock.now = 10.0
    try:
        for _ in range(20):
            assert pinned(pointers, "dog").version == first
        assert pointers.registry_away and door.finds == 2
    finally:
        door.held.set()


def test_absence_is_remembered_too_but_never_preferred_to_asking(shelf: Shelf, door: Door) -> None:
    clock = Clock()
    pointers = make_pointers(door, clock)
    assert pointers.resolve("dog", "champion") is None
    assert pointers.resolve("dog", "champion") is None
    assert door.finds == 1
    shelf.add("dog", 1)
    clock.now = 2.0
    assert pointers.resolve("dog", "champion") is not None
    door.shut = True
    clock.now = 4.0
    with pytest.raises(ServiceError):
        pointers.resolve("wolf", "champion")


def test_byte_lru() -> None:
    lru: ByteLru[str, int] = ByteLru(10)
    lru.put("a", 1, 4)
    lru.put("b", 2, 4)
    assert lru.get("a") == 1
    lru.put("c", 3, 4)
    assert (lru.get("b"), lru.get("a"), lru.get("c"), lru.used, len(lru)) == (None, 1, 3, 8, 2)
    lru.put("a", 9, 10)
    assert (lru.get("a"), lru.get("c"), lru.used) == (9, None, 10)
    lru.put("d", 4, 11)
    assert (lru.get("d"), lru.get("a"), lru.used) == (None, 9, 10)
    lru.put("a", 9, 11)
    assert (lru.get("a"), lru.used, len(lru)) == (None, 0, 0)


def test_single_flight_shares_errors_and_starts_anew() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    with pytest.raises(ZeroDivisionError):
        flight.run("a", lambda: 1 // 0)
    assert flight.run("a", lambda: 7) == 7
