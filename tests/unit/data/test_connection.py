"""Tracking URIs that can never work are the user's errors, told at once: nobody waits for them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from components.register.connection import connect, reaching
from model.errors import InputError


def test_a_database_that_cannot_be_made_or_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "mlflow.db"):
        with pytest.raises(InputError, match=f"{place} can't be written .*: name another place"):
            connect(f"sqlite:///{place}")


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
