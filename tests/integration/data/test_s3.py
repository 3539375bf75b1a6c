"""The store against a real S3 server over HTTP, with and without faults on the way."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from components.ingest import s3, store
from components.ingest.cache import file_sha256
from components.ingest.concept_folder import check_prefix, load_images
from model.base_pair import BasePair, load_base_pair
from model.errors import InputError, ServiceError
from tests.conftest import S3Bucket
from tests.faults import Faults, faulty_proxy
from tests.integration.data.fetching import fetch_and_hash
from tests.tiny import TinyPaths
from tests.unit.data.pictures import concept_folder, encoded, photo


def test_concepts_on_s3_are_checked_like_those_on_disk(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    source = tmp_path / "source"
    concept_folder(source, "dog")
    concept_folder(source, "cat", facts="")
    bad = concept_folder(source, "bad")
    (bad / "00.jpg").write_bytes(b"no image")
    (source / "concepts.yaml").write_text("cat: cat\n")
    assert store.put_folder(source, f"{s3_bucket.uri}/team/batch") == 12
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="team/batch/dog/", Body=b"")
    cache = tmp_path / "cache"
    found = {c.id: c for c in check_prefix(f"{s3_bucket.uri}/team/batch", cache=cache)}
    assert [name for name in found if found[name].valid] == ["cat", "dog"]
    assert found["bad"].problems == ("00.jpg: is not a JPEG image: replace it by a real photo",)
    on_disk = {c.id: c for c in check_prefix(str(source))}
    for name in ("cat", "dog"):
        here, there = on_disk[name].concept, found[name].concept
        assert here is not None and there is not None and here.digest == there.digest
    # One concept alone, with the facts that lie beside it.
    (alone,) = check_prefix(f"{s3_bucket.uri}/team/batch/cat/", cache=cache)
    assert alone.concept == found["cat"].concept
    # Another machine has no such path, and fetches by URI.
    concept = found["dog"].concept
    assert concept is not None
    images = load_images(concept, cache=tmp_path / "other")
    for image in concept.images:
        Path(image.path).unlink()
    again = load_images(concept, cache=tmp_path / "other")
    assert all(bool((a == b).all()) for a, b in zip(images, again, strict=True))


def test_listing_goes_on_after_the_first_page(s3_bucket: S3Bucket) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = [f"many/{index:04d}.txt" for index in range(1003)]
        list(pool.map(lambda k: s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=k), keys))
    entries = store.list_folder(f"{s3_bucket.uri}/many")
    assert [f"many/{entry.name}" for entry in entries] == keys


def test_a_prefix_ends_at_its_slash(s3_bucket: S3Bucket) -> None:
    for key in ("dog/a", "dog2/b"):
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=key, Body=b"x")
    assert [e.name for e in store.list_folder(f"{s3_bucket.uri}/dog")] == ["a"]
    assert [e.name for e in store.list_folder(s3_bucket.uri)] == ["dog/a", "dog2/b"]
    assert store.exists(f"{s3_bucket.uri}/dog") and store.exists(f"{s3_bucket.uri}/dog/a")
    assert store.exists(f"{s3_bucket.uri}/dog/") and store.exists(s3_bucket.uri)
    assert not store.exists(f"{s3_bucket.uri}/do") and not store.exists(f"{s3_bucket.uri}/dog/b")


def test_a_fetch_is_cached_by_content_and_renewed_when_the_object_changes(
    s3_bucket: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults()
    cache = tmp_path / "cache"
    for key in ("x/a.bin", "x/same.bin"):
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=key, Body=b"one")
    with faulty_proxy(s3_bucket.endpoint, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        paths = store.fetch_all(store.list_folder(f"{s3_bucket.uri}/x"), cache)
        assert paths[0] == paths[1] and paths[0].read_bytes() == b"one"
        assert len(faults.served) == 2
        assert store.fetch_all(store.list_folder(f"{s3_bucket.uri}/x"), cache) == paths
        assert len(faults.served) == 2, "the second time nothing is downloaded"
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="x/a.bin", Body=b"two")
        entry = store.find(f"{s3_bucket.uri}/x/a.bin")
        assert entry is not None
        assert store.fetch(entry, cache).read_bytes() == b"two"
        # A blob that was cut short on the disk is not taken for whole.
        store.fetch(entry, cache).write_bytes(b"t")
        assert store.fetch(entry, cache).read_bytes() == b"two"
    assert not list(cache.rglob(".part-*"))


@pytest.mark.parametrize(
    "plan", [["cut"], ["flip"], ["503"], ["slow"], ["drop"], ["late"], ["cut", "slow", "flip"]]
)
def test_a_fault_on_the_way_is_healed(
    s3_bucket: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: list[str]
) -> None:
    (tmp_path / "in").mkdir()
    data = encoded(photo())
    (tmp_path / "in" / "a.jpg").write_bytes(data)
    store.put_folder(tmp_path / "in", f"{s3_bucket.uri}/p")
    monkeypatch.setattr(s3, "READ_SECONDS", 0.3)
    faults = Faults(plan=list(plan), late_seconds=60)
    with faulty_proxy(s3_bucket.endpoint, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        (entry,) = store.list_folder(f"{s3_bucket.uri}/p")
        assert store.fetch(entry, tmp_path / "cache").read_bytes() == data
    assert len(faults.served) == len(plan) + 1


@pytest.mark.parametrize("fault", ["cut", "flip"])
def test_a_body_that_stays_damaged_is_one_problem_and_leaves_nothing(
    s3_bucket: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    s3_bucket.upload_folder(concept_folder(tmp_path, "dog", n_images=1).parent)
    faults = Faults(plan=["ok"] + [fault] * 50)  # concept.yaml comes first
    with faulty_proxy(s3_bucket.endpoint, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        (found,) = check_prefix(s3_bucket.uri, cache=tmp_path / "cache")
    assert not found.valid and len(found.problems) == 1
    assert (
        found.problems[0].startswith("00.jpg: ")
        and "arrived damaged 4 times" in (found.problems[0])
    )
    blobs = [path for path in (tmp_path / "cache" / "objects").rglob("*") if path.is_file()]
    assert len(blobs) == 1, "only concept.yaml was kept"


def test_an_object_replaced_between_listing_and_reading_is_refused(
    s3_bucket: S3Bucket, tmp_path: Path
) -> None:
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="a", Body=b"one")
    (entry,) = store.list_folder(s3_bucket.uri)
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="a", Body=b"two")
    with pytest.raises(InputError, match="was replaced while it was read"):
        store.fetch(entry, tmp_path)


def test_an_upload_in_parts_is_verified_by_its_sha256(
    s3_bucket: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "big.bin").write_bytes(bytes(9 << 20))
    store.put_folder(tmp_path / "in", f"{s3_bucket.uri}/p")
    (entry,) = store.list_folder(f"{s3_bucket.uri}/p")
    assert entry.etag is not None and "-" in entry.etag, "the ETag is no md5"
    faults = Faults(plan=["flip"])
    with faulty_proxy(s3_bucket.endpoint, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        path = store.fetch(entry, tmp_path / "cache")
    assert file_sha256(path) == file_sha256(tmp_path / "in" / "big.bin")
    assert len(faults.served) == 2


def test_many_processes_fill_one_cache(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    for index in range(4):
        body = bytes([index]) * 300_000
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=f"m/{index}", Body=body)
    entries = store.list_folder(f"{s3_bucket.uri}/m")
    cache = tmp_path / "cache"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.map(fetch_and_hash, [(entry, cache) for entry in entries * 5], chunksize=1)
    assert len({path for path, _ in results}) == 4
    assert all(path.name == sha256 for path, sha256 in results)
    assert not list(cache.rglob(".part-*"))


def test_keys_that_climb_out_are_refused(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    for key in ("m/model.safetensors", "m/unet\\evil.json"):
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=key, Body=b"{}")
    with pytest.raises(InputError, match="its key holds"):
        store.resolve_model(f"{s3_bucket.uri}/m", cache=tmp_path)


def test_a_model_on_s3_becomes_one_whole_directory(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    names = (
        *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("unet/diffusion_pytorch_model.fp16.safetensors", "sd_turbo.safetensors"),
        *("unet/diffusion_pytorch_model.bin", "tokenizer/merges.txt", ".gitattributes"),
    )
    for name in names:
        key = f"models/turbo/{name}"
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=key, Body=name.encode())
    uri = f"{s3_bucket.uri}/models/turbo"
    folder = store.resolve_model(uri, cache=tmp_path)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {names[0], names[1], names[2], "tokenizer/merges.txt"}, "no pickle, no copies"
    assert (folder / names[2]).read_text() == names[2]
    assert store.resolve_model(uri, cache=tmp_path) == folder
    s3_bucket.client.put_object(
        Bucket=s3_bucket.name, Key="models/turbo/unet/config.json", Body=b"new"
    )
    newer = store.resolve_model(uri, cache=tmp_path)
    assert newer != folder and (newer / "unet/config.json").read_text() == "new"
    assert (folder / "unet/config.json").read_text() == "unet/config.json"


def test_what_is_wrong_with_s3_is_said_in_one_sentence(
    s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def said(uri: str, kind: type[Exception] = InputError) -> str:
        with pytest.raises(kind) as caught:
            check_prefix(uri, cache=tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no such bucket" in said("s3://no-such-bucket-here/x")
    assert "holds no files" in said(f"{s3_bucket.uri}/nothing")
    assert "'in valid' is no bucket's name" in said("s3://in valid/x")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "not a url")
        assert "Invalid endpoint" in said(s3_bucket.uri)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "nobody")
        assert "the S3 settings don't work" in said(s3_bucket.uri)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        assert "no S3 credentials: set AWS_ACCESS_KEY_ID" in said(s3_bucket.uri)
    with socket.socket() as free, monkeypatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        patch.setattr(s3, "REQUEST_ATTEMPTS", 2)
        assert "is out of reach" in said(s3_bucket.uri, ServiceError)


ANSWERS = {
    "AccessDenied": (403, InputError, "S3 refused the credentials (AccessDenied): check AWS_"),
    "InvalidAccessKeyId": (403, InputError, "S3 refused the credentials (InvalidAccessKeyId)"),
    "SignatureDoesNotMatch": (403, InputError, "S3 refused the credentials"),
    "SlowDown": (503, ServiceError, "S3 keeps answering SlowDown: try later"),
    "TooManyRequests": (429, ServiceError, "S3 keeps answering TooManyRequests: try later"),
    "InternalError": (500, ServiceError, "S3 keeps answering InternalError: try later"),
    "InvalidBucketName": (400, InputError, "S3 answered InvalidBucketName"),
}


@pytest.mark.parametrize("code", ANSWERS)
def test_what_a_server_answers_is_said_in_one_sentence(
    code: str, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, kind, expected = ANSWERS[code]

    class Refusing(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(s3, "REQUEST_ATTEMPTS", 2)
    try:
        with pytest.raises(kind) as caught:
            check_prefix("s3://bucket/prefix", cache=tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_uploads_to_a_wrong_bucket_and_to_disk(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    folder = concept_folder(tmp_path, "dog")
    with pytest.raises(InputError, match="there is no such bucket"):
        store.put_folder(folder, "s3://no-such-bucket-here/x")
    assert store.put_folder(folder, (tmp_path / "copy").as_uri()) == 4
    assert (tmp_path / "copy" / "00.jpg").read_bytes() == (folder / "00.jpg").read_bytes()
    with pytest.raises(InputError, match="holds no files"):
        (tmp_path / "void").mkdir()
        store.put_folder(tmp_path / "void", s3_bucket.uri)


def test_a_base_pair_on_s3_loads_as_the_same(
    s3_bucket: S3Bucket, tiny: TinyPaths, pair: BasePair, tmp_path: Path
) -> None:
    for folder in (tiny.teacher, tiny.student):
        store.put_folder(folder, f"{s3_bucket.uri}/bases/{folder.name}")
    places = [
        store.resolve_model(f"{s3_bucket.uri}/bases/{folder.name}/", cache=tmp_path)
        for folder in (tiny.teacher, tiny.student)
    ]
    assert load_base_pair(*places, name="tiny").hash == pair.hash
