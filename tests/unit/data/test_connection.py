"""Tracking URIs that can never work are the user's errors, told at once: nobody waits for them."""

from __future__ import annotations

import resource
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError, NoCredentialsError
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, RESOURCE_DOES_NOT_EXIST

from components.register.connection import RegistryAwayError, connect, reaching
from components.register.registry import set_alias
from components.train.delivery import is_hopeless
from model.errors import EchoDistillError, InputError


def test_a_database_that_cannot_be_made_or_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "mlflow.db"):
        with pytest.raises(InputError, match=f"{place} can't be written .*: name another place"):
            connect(f"sqlite:///{place}")


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "notes.txt"
    place.write_text("not a database")
    with pytest.raises(InputError, match=f"{place} is no SQLite database: name another file"):
        connect(f"sqlite:///{place}")
    assert place.read_text() == "not a database"


def test_a_database_that_may_only_be_read_is_refused_when_it_is_written(tmp_path: Path) -> None:
    place = tmp_path / "mlflow.db"
    sqlite3.connect(place).close()
    database = sqlite3.connect(f"file:{place}?mode=ro", uri=True)
    refused = pytest.raises(InputError, match=f"may not write sqlite:///{place}")
    with refused, reaching(f"sqlite:///{place}"):
        database.execute("create table versions (name text)")


def test_a_database_whose_driver_is_missing_is_refused() -> None:
    with pytest.raises(InputError, match="mysql://x/y needs the Python module MySQLdb"):
        connect("mysql://me:secret@x/y")


def test_a_database_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    place = tmp_path / "runs" / "mlflow.db"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(EchoDistillError):
            connect(f"sqlite:///{place}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(place.parent.iterdir())
    place.touch()  # and what an earlier version left empty is made
    with ThreadPoolExecutor(2) as threads:
        clients = list(threads.map(connect, [f"sqlite:///{place}"] * 2))
    made = clients[0].create_experiment("shared")
    assert clients[1].get_experiment_by_name("shared").experiment_id == made
    assert list(place.parent.iterdir()) == [place]


def test_a_full_disk_is_said_so_whoever_met_it() -> None:
    full = pytest.raises(EchoDistillError, match="no space left on the disk while writing the MLfl")
    with full, reaching("sqlite:///x.db"):
        raise sqlite3.OperationalError("database or disk is full")


REFUSED = "Failed to upload a to b/a: An error occurred (AccessDenied) when calling PutObject"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (S3UploadFailedError(REFUSED), "AccessDenied"),
        (ClientError({"Error": {"Code": "NoSuchBucket"}}, "PutObject"), "NoSuchBucket"),
        (NoCredentialsError(), "Unable to locate credentials"),
    ],
)
def test_an_artifact_store_that_refuses_is_not_waited_for(error: Exception, words: str) -> None:
    refused = pytest.raises(InputError, match=f"the artifact store of .* refused .*{words}")
    with refused, reaching("http://mlflow"):
        raise error
    assert is_hopeless(error)


def test_an_artifact_store_that_is_away_is_waited_for() -> None:
    error = ClientError({"Error": {"Code": "SlowDown"}}, "PutObject")
    with pytest.raises(RegistryAwayError), reaching("http://mlflow"):
        raise error
    assert not is_hopeless(error)


class Refusing:
    """An MLflow client whose server refuses the first requests."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.set: list[tuple[str, str, str]] = []

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        if self.codes:
            raise MlflowException("UNIQUE constraint failed", error_code=self.codes.pop(0))
        self.set.append((name, alias, version))


def test_an_alias_that_another_makes_at_the_same_time_is_set_all_the_same() -> None:
    client = Refusing(BAD_REQUEST)
    set_alias(client, "echodistill.dog", "candidate", 2)
    assert client.set == [("echodistill.dog", "candidate", "2")]


@pytest.mark.parametrize("codes", [(BAD_REQUEST, BAD_REQUEST), (RESOURCE_DOES_NOT_EXIST,)])
def test_an_alias_that_is_refused_for_another_reason_is_not_set(codes: tuple[int, ...]) -> None:
    client = Refusing(*codes)
    with pytest.raises(MlflowException):
        set_alias(client, "echodistill.dog", "candidate", 2)
    assert not client.set
