"""The MLflow server: a client with bounded waits, its errors as sentences, the experiment."""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from components.ingest.cache import disk_error
from model.errors import AwayError, EchoDistillError, InputError

DEFAULT_EXPERIMENT = "echodistill"
# MLflow's own defaults keep a request to a dead server busy for many minutes.
_LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",  # who must wait longer has patience (below)
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Standard output belongs to whoever asked: a command may write one JSON document there.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 20.0  # seconds between two tries
_SQLITE = b"SQLite format 3\0"  # what such a file begins with
T = TypeVar("T")

# What the HTTP library says inside a long report of its own, the more special first.
_NO_CONNECTION = {
    "Connection refused": "connection refused",
    "NameResolutionError": "no such host",
    "timed out": "it timed out",
    "SSLError": "its certificate is not accepted",
    "Connection aborted": "the connection broke",
    "RemoteDisconnected": "the connection broke",
    "IncompleteRead": "the connection broke",
    "too many 503": "it answers 503",
    "Max retries exceeded": "no connection",
}


# How boto3 names a store that will not do what MLflow's client asks of it, also in the text of an
# error of its own.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
_REFUSED = re.compile(
    r"An error occurred \((AccessDenied|AllAccessDisabled|InvalidAccessKeyId|NoSuchBucket"
    r"|SignatureDoesNotMatch|40[134])\)"
)


class RegistryAwayError(AwayError):
    """The MLflow server does not answer: what was to be told to it waits."""


class Patience:
    """Waits for a service that is away, ever longer, and no longer than so many seconds.

    What was waited counts for all that is asked, until the server answers again: of many concepts
    one alone waits.
    """

    def __init__(
        self,
        seconds: float,
        say: Callable[[str], None],
        sleep: Callable[[float], object] = time.sleep,
        what: type[AwayError] = RegistryAwayError,
    ) -> None:
        """Wait at most `seconds`; `say` hears of each wait, and `sleep` waits.

        `what` is waited for: by default an MLflow server, with `AwayError` a storage as well.
        """
        self._seconds = seconds
        self._say = say
        self._sleep = sleep
        self._what = what
        self._since: float | None = None

    def ask(self, what: Callable[[], T]) -> T:
        """Return what `what` returns, asked again while the service is away.

        Raises:
            AwayError: when it stayed away; `what` is asked once at least.
        """
        pause = _FIRST_PAUSE
        while True:
            try:
                answer = what()
            except self._what as error:
                now = time.monotonic()
                self._since = self._since or now
                left = self._seconds - (now - self._since)
                if left <= 0:
                    raise
                self._say(f"waits {min(pause, left):.0f} s: {error}")
                self._sleep(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._since = None
                return answer


def connect(tracking_uri: str) -> Any:
    """Return an MlflowClient for tracking and registry at one URI (nothing global is set)."""
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    with reaching(tracking_uri):
        path = sqlite_path(tracking_uri)
        if path is not None:
            _make_database(path)
        return MlflowClient(tracking_uri, tracking_uri)


def sqlite_path(tracking_uri: str) -> Path | None:
    """Return the file of a SQLite URI, None for any other URI."""
    scheme, _, path = tracking_uri.partition(":///")
    return Path(path) if scheme == "sqlite" and path else None


def _make_database(path: Path) -> None:
    """Make a SQLite database and its folder, whole or not at all.

    MLflow tries for minutes to open a file that it can't, and does not say what is wrong with it;
    and a database whose making broke off (a full disk, a kill) it never finishes. So its tables are
    made in a file beside, which then takes the name, unless another process was first.
    """
    from mlflow import MlflowClient

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:  # who only reads need not write
                if file.read(len(_SQLITE)) == _SQLITE:
                    return
            raise InputError(f"{path} is no SQLite database: name another file")
        part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
        part.touch()
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        uri = f"sqlite:///{part.resolve()}"
        MlflowClient(uri, uri).search_experiments(max_results=1)
        if path.exists() and not path.stat().st_size:
            path.unlink()
        with suppress(FileExistsError):
            os.link(part, path)
    finally:
        for left in path.parent.glob(f"{part.name}*"):  # SQLite's journal too
            left.unlink(missing_ok=True)


def code_of(error: BaseException) -> str:
    """Return MLflow's code of an error ("" for an error of another kind)."""
    return str(getattr(error, "error_code", ""))


def is_refusal(error: BaseException) -> bool:
    """Tell whether S3 refused what MLflow's client asked of it directly, and will again."""
    name, said = type(error).__name__, str(error)
    return name in _NO_CREDENTIALS or bool(_REFUSED.search(said))


@contextmanager
def reaching(tracking_uri: str) -> Iterator[None]:
    """Turn what goes wrong in the block into ServiceError, or InputError for a wrong setting."""
    try:
        yield
    except EchoDistillError:
        raise
    except Exception as error:
        where = f"the MLflow server at {hide_password(tracking_uri)}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_error(error, where) from error
        if isinstance(error, ModuleNotFoundError):
            raise InputError(
                f"{hide_password(tracking_uri)} needs the Python module {error.name}, which is not "
                "here: install its package, or name another MLflow server"
            ) from error
        if "database or disk is full" in str(error):
            raise disk_error(OSError(errno.ENOSPC, "no space left"), where) from error
        if "readonly database" in str(error):
            raise InputError(
                f"may not write {hide_password(tracking_uri)} (read-only): name another place"
            ) from error
        # A path without a scheme means MLflow's old file store, which it keeps no more.
        if "unsupported URI" in str(error) or "filesystem tracking backend" in str(error):
            raise InputError(
                f"{hide_password(tracking_uri)} is no MLflow server: write sqlite:///file.db or "
                "http://host:port"
            ) from error
        code = code_of(error)
        reason = hide_password(_reason(error))
        if code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            raise InputError(
                f"{where} refused the credentials ({reason}): check MLFLOW_TRACKING_USERNAME, "
                "MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN"
            ) from error
        if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise InputError(f"{where} refused a request: {reason}") from error
        if is_refusal(error):
            raise InputError(
                f"the artifact store of {where} refused ({reason}): check its bucket, and the "
                "credentials and rights of who reads and writes there"
            ) from error
        raise RegistryAwayError(
            f"{where} did not answer ({reason}): check that it runs and can be reached"
        ) from error


def _reason(error: Exception) -> str:
    """Return the first line of an error, or in a word why there was no connection."""
    text = str(error)
    for words, meaning in _NO_CONNECTION.items():
        if words in text:
            return meaning
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def hide_password(text: str) -> str:
    """Return a text with the user and password of its URIs left out."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def experiment_id(client: Any, tracking_uri: str, name: str = DEFAULT_EXPERIMENT) -> str:
    """Return the id of an experiment, made when it is missing.

    A SQLite file's artifacts go beside it: MLflow's default is the folder a process runs in.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        path = sqlite_path(tracking_uri)
        place = None if path is None else path.resolve().parent / "mlartifacts"
        location = None if place is None else str(place)
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except Exception:
            found = client.get_experiment_by_name(name)  # another process made it just now
            if found is None:
                raise
    return str(found.experiment_id)
