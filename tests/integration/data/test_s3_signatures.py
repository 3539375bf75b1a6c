"""Against an S3 server that checks who asks and how each request is signed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow.fs
import pytest
import requests
from botocore.config import Config

from components.ingest import documents, s3, store
from model.errors import InputError
from tests.conftest import AWS_NAMES
from tests.services import moto_process

POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a process of its own: whether it checks is said once for all its requests."""
    with moto_process(tmp_path_factory.mktemp("strict")) as url:
        yield url


@pytest.fixture(scope="module")
def keys(endpoint: str) -> tuple[str, str]:
    """The access key and secret of somebody who may do everything; from then on it is checked."""
    anyone = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    iam = boto3.session.Session().client("iam", endpoint_url=endpoint, **anyone)
    iam.create_user(UserName="trainer")
    iam.put_user_policy(UserName="trainer", PolicyName="all", PolicyDocument=json.dumps(POLICY))
    made = iam.create_access_key(UserName="trainer")["AccessKey"]
    answer = requests.post(f"{endpoint}/moto-api/reset-auth", data=b"0", timeout=10)
    assert answer.ok, answer.text
    return made["AccessKeyId"], made["SecretAccessKey"]


@pytest.fixture
def signed(endpoint: str, keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The bucket of somebody with the right keys in the environment."""
    s3._client.cache_clear()
    for name, value in zip(AWS_NAMES, (endpoint, *keys, "us-east-1"), strict=True):
        monkeypatch.setenv(name, value)
    client = boto3.session.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
    client.create_bucket(Bucket="signed")
    yield "s3://signed"
    s3._client.cache_clear()


def test_all_that_is_asked_of_s3_is_signed_right(signed: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    names = ["plain.bin", "with space & plus+.bin", "ümlaut.bin"]  # which signatures encode
    for name in names:
        (folder / name).write_bytes(name.encode() * 1000)
    large = os.urandom(9 * 2**20)  # uploaded in parts
    (folder / "large.bin").write_bytes(large)
    store.put_folder(folder, f"{signed}/a folder")
    entries = store.list_folder(f"{signed}/a folder")
    assert sorted(entry.name for entry in entries) == sorted([*names, "large.bin"])
    for entry in entries:
        fetched = store.fetch(entry, tmp_path / "cache").read_bytes()
        assert fetched == (folder / entry.name).read_bytes()
    assert store.exists(f"{signed}/a folder/plain.bin")

    place = f"{signed}/state.json"
    tag = documents.write(place, {"at": 1}, documents.ABSENT)
    assert tag and documents.write(place, {"at": 2}, documents.ABSENT) is None
    assert documents.write(place, {"at": 3}, tag)
    found = documents.read(place)
    assert found is not None and found.value == {"at": 3}

    # What Ray Train keeps its checkpoints with.
    files, root = pyarrow.fs.FileSystem.from_uri(
        f"{signed}/runs?scheme=http&endpoint_override={os.environ['AWS_ENDPOINT_URL'][7:]}"
    )
    with files.open_output_stream(f"{root}/checkpoint.bin") as stream:
        stream.write(large)
    with files.open_input_stream(f"{root}/checkpoint.bin") as stream:
        assert stream.read() == large


@pytest.mark.parametrize("wrong", ["id", "secret"])
def test_wrong_keys_are_one_sentence(
    signed: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = AWS_NAMES[1] if wrong == "id" else AWS_NAMES[2]
    right = os.environ[name]  # made up anew every time, and may end with any letter
    monkeypatch.setenv(name, right[:-1] + ("y" if right.endswith("x") else "x"))
    s3._client.cache_clear()
    for ask in (
        lambda: store.list_folder(f"{signed}/a folder"),
        lambda: documents.read(f"{signed}/state.json"),
        lambda: documents.write(f"{signed}/state.json", {}),
    ):
        with pytest.raises(InputError, match="S3 refused the credentials") as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert os.environ[AWS_NAMES[2]] not in str(caught.value)
