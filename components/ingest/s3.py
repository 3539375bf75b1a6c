"""S3 through boto3: any endpoint (``AWS_ENDPOINT_URL``), the standard credential chain.

Every failure becomes one sentence: InputError for what the user named or set (bucket, key,
credentials, endpoint), AwayError for a service that is out of reach.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from components.ingest.cache import disk_error
from model.errors import AwayError, InputError

CONNECT_SECONDS = 5
READ_SECONDS = 30
REQUEST_ATTEMPTS = 4  # boto's, with exponential backoff, for errors before a body
BODY_ATTEMPTS = 4  # ours, for bodies that break off or arrive changed
SHA256_METADATA = "sha256"
T = TypeVar("T")
_CHUNK = 1 << 20
_MD5 = re.compile(r"[0-9a-f]{32}")
_DENIED = {
    "AccessDenied",
    "403",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
}


@dataclass(frozen=True)
class FoundObject:
    """One object of a listing; ``etag`` without its quotes."""

    key: str
    size: int
    etag: str


class _BrokenBodyError(Exception):
    """A body that broke off or does not have the checksum it was stored under."""


def parse(uri: str) -> tuple[str, str]:
    """Split ``s3://bucket/key`` into bucket and key; InputError without a bucket."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
        wrong = f"{bucket!r} is no bucket's name" if bucket else "names no bucket"
        raise InputError(f"{uri}: {wrong}: write s3://bucket/prefix")
    return bucket, key


def text_sha256(text: str) -> str:
    """Return the sha256 of a text as hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def endpoint() -> str:
    """Return the endpoint that requests go to ("" for Amazon's own)."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def client() -> Any:
    """Return this process's client for the present endpoint, region and credentials.

    Clients are safe to share between threads, but not with a forked child.
    """
    names = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ACCESS_KEY_ID")
    settings = tuple(os.environ.get(name) for name in names)
    return _client(os.getpid(), endpoint(), settings)


@functools.lru_cache(maxsize=4)
def _client(_pid: int, _endpoint: str, _settings: tuple[str | None, ...]) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "max_pool_connections": 32,
        "retries": {"mode": "standard", "max_attempts": REQUEST_ATTEMPTS},
    }
    try:
        session: Any = boto3.session.Session()
        if endpoint():  # servers of one's own have no host name per bucket,
            config["s3"] = {"addressing_style": "path"}
            # and many refuse the checksums that boto adds to requests since 2025.
            if "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
                config["request_checksum_calculation"] = "when_required"
        return session.client("s3", config=Config(**config))
    except (BotoCoreError, ValueError) as error:
        raise InputError(f"the S3 settings don't work: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Turn boto's errors in the block into InputError or AwayError about ``what``."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        _raise_answer(what, error)
    except BotoCoreError as error:
        _raise_request(what, error)


def _raise_answer(what: str, error: Any) -> NoReturn:
    """Say what an error answer of the service means."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)
    if code == "NoSuchBucket":
        raise InputError(f"{what}: there is no such bucket: check its name and the endpoint") from (
            error
        )
    if code in ("NoSuchKey", "404", "NotFound"):
        raise InputError(f"{what}: there is no such object: check the name") from error
    if code in ("PreconditionFailed", "412"):
        raise InputError(f"{what} was replaced while it was read: run the command again") from error
    if code in _DENIED or status in (401, 403):
        raise InputError(
            f"{what}: S3 refused the credentials ({code}): check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE and what they may read"
        ) from error
    later = ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed")
    if status >= 500 or status == 429 or code in later:
        raise AwayError(f"{what}: S3 keeps answering {code or status}: try later") from error
    raise InputError(f"{what}: S3 answered {code or status}: {_first_line(error)}") from error


def _raise_request(what: str, error: Any) -> NoReturn:
    """Say why a request could not be made or had no answer."""
    from botocore import exceptions

    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        raise InputError(
            f"{what}: no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE"
        ) from error
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
        place = endpoint() or "Amazon S3"
        raise AwayError(
            f"{what}: {place} is out of reach: check AWS_ENDPOINT_URL and the network"
        ) from error
    raise InputError(f"{what}: {_first_line(error)}") from error


def list_objects(bucket: str, prefix: str) -> Iterator[FoundObject]:
    """Yield every object below a prefix, page by page."""
    with _plain_errors(f"s3://{bucket}/{prefix}"):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for page in pages:
            for item in page.get("Contents", []):
                yield FoundObject(item["Key"], item["Size"], item.get("ETag", "").strip('"'))


def find(bucket: str, key: str) -> FoundObject | None:
    """Return one object's facts, or None when it (or its bucket) is not there."""
    from botocore.exceptions import ClientError

    with _plain_errors(f"s3://{bucket}/{key}"):
        try:
            answer = client().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey", "NotFound"):
                return None
            raise
        return FoundObject(key, answer["ContentLength"], answer.get("ETag", "").strip('"'))


def has_any(bucket: str, key: str) -> bool:
    """Return whether there is an object ``key`` or any object below ``key/``."""
    if key and find(bucket, key) is not None:
        return True
    prefix = f"{key.rstrip('/')}/" if key else ""
    with _plain_errors(f"s3://{bucket}/{key}"):
        answer = client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return bool(answer.get("Contents"))


def read(bucket: str, key: str) -> tuple[bytes, str]:
    """Return a small object's bytes and its ETag; a body that breaks off is read again."""
    what = f"s3://{bucket}/{key}"

    def once() -> tuple[bytes, str]:
        answer = client().get_object(Bucket=bucket, Key=key)
        data, etag = b"".join(_body(answer["Body"])), answer["ETag"].strip('"')
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        _verify(
            answer, answer["ContentLength"], len(data), hashlib.sha256(data).hexdigest(), md5, etag
        )
        return data, etag

    return _whole(once, what)


def download(bucket: str, key: str, target: Path, *, size: int, etag: str | None) -> str:
    """Write an object into ``target`` and return its sha256.

    The body must have the listed size and whatever checksums the object has: the ETag of a
    plain upload (an md5), our own ``sha256`` metadata, and S3's checksums, which boto
    checks. A body that breaks off or differs is read again, then refused (InputError).
    """
    try:
        return _whole(
            lambda: _download_once(bucket, key, target, size, etag), f"s3://{bucket}/{key}"
        )
    except OSError as error:
        raise disk_error(error, target) from error


def _whole(once: Callable[[], T], what: str) -> T:
    """Read a body, again when it arrives broken."""
    for attempt in range(1, BODY_ATTEMPTS + 1):
        try:
            with _plain_errors(what):
                return once()
        except _BrokenBodyError as error:
            if attempt == BODY_ATTEMPTS:
                raise InputError(
                    f"{what} arrived damaged {BODY_ATTEMPTS} times ({error}): upload it again"
                ) from error
            time.sleep(0.1 * 2**attempt)
    raise AssertionError("unreachable")


def _download_once(bucket: str, key: str, target: Path, size: int, etag: str | None) -> str:
    condition: dict[str, Any] = {"IfMatch": etag} if etag else {}
    answer = client().get_object(Bucket=bucket, Key=key, **condition)
    sha256, md5, count = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with open(target, "wb") as file:
        for chunk in _body(answer["Body"]):
            sha256.update(chunk)
            md5.update(chunk)
            count += len(chunk)
            file.write(chunk)
    _verify(answer, size, count, sha256.hexdigest(), md5.hexdigest(), etag)
    return sha256.hexdigest()


def _body(stream: Any) -> Iterator[bytes]:
    """Yield a body's chunks; what breaks on the way is a broken body."""
    from botocore import exceptions

    try:
        yield from stream.iter_chunks(_CHUNK)
    except (
        exceptions.IncompleteReadError,
        exceptions.ResponseStreamingError,
        exceptions.FlexibleChecksumError,
        exceptions.ReadTimeoutError,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise _BrokenBodyError(_first_line(error)) from error


def _verify(answer: Any, size: int, count: int, sha256: str, md5: str, etag: str | None) -> None:
    if count != size:
        raise _BrokenBodyError(f"{count} of {size} bytes")
    stored = answer.get("Metadata", {}).get(SHA256_METADATA)
    if stored and stored != sha256:
        raise _BrokenBodyError("its sha256 is not the stored one")
    # The ETag of an upload in parts, or one encrypted with a key of KMS, is not an md5.
    plain = answer.get("ServerSideEncryption") in (None, "AES256")
    plain = plain and "SSECustomerAlgorithm" not in answer
    if etag and plain and _MD5.fullmatch(etag) and md5 != etag:
        raise _BrokenBodyError("its md5 is not its ETag")


def upload(path: Path, bucket: str, key: str, *, sha256: str) -> None:
    """Upload a file whole (in parts when it is large), with its sha256 as metadata."""
    from boto3.exceptions import Boto3Error

    what = f"s3://{bucket}/{key}"
    with _plain_errors(what):
        try:
            client().upload_file(
                str(path), bucket, key, ExtraArgs={"Metadata": {SHA256_METADATA: sha256}}
            )
        except Boto3Error as error:  # S3UploadFailedError wraps the service's answer
            cause = error.__context__ or error.__cause__
            if cause is not None and hasattr(cause, "response"):
                _raise_answer(what, cause)
            raise AwayError(f"{what}: the upload failed: {_first_line(error)}") from error
