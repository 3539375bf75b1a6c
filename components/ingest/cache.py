"""The local cache: downloads kept by content, filled by atomic rename, shared by processes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import DISK_FULL, EchoDistillError, InputError, ServiceError

_CHUNK = 1 << 20
_READABLE = 0o644  # a cache may be shared by users; temporary files are born private


def cache_root(cache: Path | None = None) -> Path:
    """Return the cache folder: ``cache``, else ``ECHODISTILL_CACHE``, else the user's."""
    if cache is not None:
        return Path(cache)
    named = os.environ.get("ECHODISTILL_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "echodistill"


def disk_error(error: OSError, where: Path | str) -> EchoDistillError:
    """Turn an error of the disk into one sentence that says what to do."""
    if error.errno in DISK_FULL:
        return ServiceError(f"no space left on the disk while writing {where}: free some and rerun")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"may not write {where} ({error.strerror}): name another place")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return InputError(f"{where} can't be written ({error.strerror}): name another place")
    return ServiceError(f"could not write {where}: {error.strerror or error}")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``target`` that takes its place when the block ends well.

    Readers see the old file or the whole new one. Errors of the disk become
    ``ServiceError`` or ``InputError``; the temporary file is removed on any failure.
    """
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".part-", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(_READABLE)
        yield temporary
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends well.

    When another process made ``target`` in the meantime, its folder is kept: the two hold
    the same content, because the name says what the content is.
    """
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
        temporary.chmod(_READABLE | 0o111)
        yield temporary
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


class ContentCache:
    """Blobs by sha256, and pointers from a source (endpoint, key, ETag, size) to a blob."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def blob(self, sha256: str) -> Path:
        """Return where the blob with this sha256 lies, there or not."""
        return self.root / "objects" / sha256[:2] / sha256

    def _pointer(self, source: str) -> Path:
        name = hashlib.sha256(source.encode()).hexdigest()
        return self.root / "sources" / name[:2] / name

    def find(self, source: str, size: int) -> Path | None:
        """Return the whole blob a source was stored under, or None."""
        try:
            sha256 = self._pointer(source).read_text().strip()
            path = self.blob(sha256)
            return path if path.stat().st_size == size else None
        except OSError:
            return None

    def keep(self, temporary: Path, sha256: str, source: str) -> Path:
        """Move a finished download in and remember its source; returns the blob's path."""
        target = self.blob(sha256)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, target)
        except OSError as error:
            raise disk_error(error, target) from error
        with replacing(self._pointer(source)) as pointer:
            pointer.write_text(sha256)
        return target

    @contextmanager
    def download(self) -> Iterator[Path]:
        """Yield a temporary file in the cache; it is removed unless ``keep`` moved it."""
        folder = self.root / "objects"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".part-", dir=folder)
            os.close(handle)
            temporary = Path(name)
            temporary.chmod(_READABLE)
        except OSError as error:
            raise disk_error(error, folder) from error
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
