"""Small JSON documents on S3 or in a folder: written whole or not at all, and on a condition.

A write may be made to depend on what is there (S3: If-None-Match and If-Match; a folder: a lock),
so that of two writers who saw the same one wins and the other knows. A store that has no
conditional writes is written to without them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.ingest import s3, store
from components.ingest.cache import disk_error, replacing
from model.errors import InputError, ServiceError

ABSENT = ""  # the tag of what is not there
_READERS = 16
# 409: two conditional writes met; whoever gets it has lost.
_REFUSED = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_UNABLE = {"NotImplemented", "501"}
_MISSING = {"NoSuchKey", "404"}
# What a file system says of a wrong path; anything else (a share that is gone) may pass.
_WRONG = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


@dataclass(frozen=True)
class Document:
    """A document and the tag of this version of it."""

    value: Any
    tag: str


class NoJsonError(InputError):
    """There is something else than JSON, or half of it."""


def read(uri: str) -> Document | None:
    """Read a document; None when it is not there.

    Raises:
        NoJsonError: when it is not JSON.
        InputError: when the store refuses.
        ServiceError: when the store is out of reach.
    """
    if store.is_s3(uri):
        return _read_s3(uri)
    try:
        data = store.local_path(uri).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        kind = InputError if error.errno in _WRONG else ServiceError
        raise kind(f"{uri} can't be read: {error.strerror}") from error
    return Document(_parse(data, uri), _sha256(data))


def write(uri: str, value: Any, expected: str | None = None) -> str | None:
    """Write a document.

    Args:
        uri: where.
        value: what json can write.
        expected: the tag of the version that this one replaces, or `ABSENT`; None: whatever is
            there.

    Returns:
        the new tag, or None when something else than what was expected is there.

    Raises:
        InputError: when the store refuses.
        ServiceError: when the store is out of reach or full.
    """
    data = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    if store.is_s3(uri):
        return _write_s3(uri, data, expected)
    return _write_local(store.local_path(uri), data, expected)


def read_folder(uri: str, known: Mapping[str, Document] | None = None) -> dict[str, Document]:
    """Read the documents of a folder, by name without `.json`.

    Those in `known` that have not changed since are taken from there.
    """
    known = known or {}
    tags = _list_s3(uri) if store.is_s3(uri) else _list_local(store.local_path(uri))
    changed = [name for name, tag in tags.items() if name not in known or known[name].tag != tag]
    with ThreadPoolExecutor(_READERS) as pool:
        fresh = list(pool.map(lambda name: read(store.join(uri, f"{name}.json")), changed))
    found = {name: known[name] for name in tags if name in known}
    for name, document in zip(changed, fresh, strict=True):
        if document is not None:  # else it went between the listing and now
            found[name] = Document(document.value, tags[name])
    return found


def list_folders(uri: str) -> list[str]:
    """Return the names of the folders directly below a folder, sorted; none when it is missing."""
    if not store.is_s3(uri):
        root = store.local_path(uri)
        return (
            sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        )
    bucket, key = s3.parse(uri)
    prefix = f"{key.rstrip('/')}/"
    with s3._plain_errors(uri):
        pages = s3.client().get_paginator("list_objects_v2")
        found = [
            common["Prefix"][len(prefix) :].rstrip("/")
            for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
            for common in page.get("CommonPrefixes", [])
        ]
    return sorted(found)


def _parse(data: bytes, uri: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise NoJsonError(f"{uri} is not JSON: it was not written by this program") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_s3(uri: str) -> Document | None:
    from botocore.exceptions import ClientError

    bucket, key = s3.parse(uri)
    try:
        data, etag = s3.read(bucket, key)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, ClientError) and _code(cause) in _MISSING:
            return None
        raise
    return Document(_parse(data, uri), etag)


def _write_s3(uri: str, data: bytes, expected: str | None) -> str | None:
    from botocore.exceptions import ClientError

    bucket, key = s3.parse(uri)
    request: dict[str, Any] = {"Bucket": bucket, "Key": key, "Body": data}
    condition: dict[str, Any] = {}
    if expected is not None:
        condition = {"IfMatch": f'"{expected}"'} if expected else {"IfNoneMatch": "*"}
    with s3._plain_errors(uri):
        try:
            answer = s3.client().put_object(**request, **condition)
        except ClientError as error:
            code = _code(error)
            gone = bool(expected) and code in _MISSING
            if condition and (code in _REFUSED or gone):
                retried = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
                return _own_tag(bucket, key, data) if retried else None
            if not (condition and code in _UNABLE):
                raise
            answer = s3.client().put_object(**request)
        return str(answer["ETag"]).strip('"')


def _own_tag(bucket: str, key: str, data: bytes) -> str | None:
    """Return the tag of what is there if it is what was to be written.

    An answer may get lost: boto then asks again and is refused by what its own first try wrote.
    """
    try:
        there, tag = s3.read(bucket, key)
    except InputError:  # it is gone
        return None
    return tag if there == data else None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _write_local(path: Path, data: bytes, expected: str | None) -> str | None:
    if expected is None:
        _replace(path, data)
        return _sha256(data)
    with _locked(path.parent):
        try:
            there = _sha256(path.read_bytes())
        except FileNotFoundError:
            there = ABSENT
        if there != expected:
            return None
        _replace(path, data)
        return _sha256(data)


def _replace(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process that holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise disk_error(error, folder) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    except OSError as error:
        if error.errno != errno.ENOLCK:
            raise disk_error(error, folder) from error
        raise InputError(f"{folder} is on a file system without locks: take another one") from error
    finally:
        os.close(handle)


def _list_s3(uri: str) -> dict[str, str]:
    bucket, key = s3.parse(uri)
    prefix = f"{key.rstrip('/')}/"
    names = ((found.key[len(prefix) :], found.etag) for found in s3.list_objects(bucket, prefix))
    return {
        n.removesuffix(".json"): tag for n, tag in names if n.endswith(".json") and "/" not in n
    }


def _list_local(folder: Path) -> dict[str, str]:
    tags = {}
    if folder.is_dir():
        for entry in os.scandir(folder):
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                status = entry.stat()
                # Every write makes a new file, so its number tells versions of one time apart.
                tag = f"{status.st_mtime_ns}-{status.st_ino}-{status.st_size}"
                tags[entry.name.removesuffix(".json")] = tag
    return tags
