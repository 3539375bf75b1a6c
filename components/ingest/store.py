"""One face for files on S3, on disk and on the hub: list, fetch, put, exists, resolve_model."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from components.ingest import hub, s3
from components.ingest.cache import (
    ContentCache,
    cache_root,
    disk_error,
    file_sha256,
    replacing,
    replacing_folder,
)
from model.errors import InputError

MAX_ENTRIES = 1_000_000
WORKERS = 8
_POCKET = "pocket:"
EMPTY_FOLDER = "is a folder without files"
FOLDER_LINK = "is a link to a folder, which is not followed: put the folder itself in its place"


@dataclass(frozen=True)
class Entry:
    """One file of a listed folder; ``name`` is relative to it, with ``/`` separators.

    ``refusal`` says why the file must not be read (a link that leaves the folder, a pipe).
    """

    name: str
    uri: str
    size: int
    etag: str | None = None
    refusal: str = ""


def is_s3(uri: str) -> bool:
    """Return whether a URI names an S3 object or prefix."""
    return uri.startswith("s3://")


def local_path(uri: str) -> Path:
    """Return the path of a plain path or ``file://`` URI; InputError for another scheme."""
    if "\0" in uri or not uri.strip():
        raise InputError(f"{uri!r} names no file or folder: give a path, file:// or s3:// URI")
    if "://" not in uri:
        return Path(uri).expanduser()
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise InputError(f"{uri} is neither a path, file:///... nor s3://...: give one of these")
    return Path(unquote(parts.path))


def absolute(uri: str) -> str:
    """Return a URI that means the same elsewhere: a folder's absolute path, an S3 URI as it is.

    Raises:
        InputError: for an S3 URI without a bucket, or another scheme.
    """
    if is_s3(uri):
        s3.parse(uri)
        return uri
    return str(local_path(uri).resolve())


def join(uri: str, name: str) -> str:
    """Return the URI of ``name`` below the folder ``uri``."""
    return f"{uri.rstrip('/')}/{name}"


def parent_and_name(uri: str) -> tuple[str, str] | None:
    """Return a folder's parent URI and its own last name; None for a root or bucket."""
    if is_s3(uri):
        bucket, key = s3.parse(uri)
        head, _, name = key.rstrip("/").rpartition("/")
        return (f"s3://{bucket}/{head}".rstrip("/"), name) if name else None
    path = _resolved(local_path(uri))
    return (str(path.parent), path.name) if path.name else None


def list_folder(uri: str, *, depth: int | None = None, empty: bool = False) -> list[Entry]:
    """List the files below a folder or prefix, by name, ``depth`` levels of folders deep.

    With ``empty`` a folder in it that holds no listed file is an entry too, refused as
    ``EMPTY_FOLDER`` (on S3, one that a console made).
    Raises InputError when the folder is missing or holds no file, the bucket is wrong or
    credentials are missing or refused, and ServiceError when S3 is out of reach.
    """
    entries, folders = _list_s3(uri, depth) if is_s3(uri) else _list_local(uri, depth)
    if empty:
        bare = folders - {entry.name.partition("/")[0] for entry in entries}
        entries += [Entry(name, join(uri, name), 0, refusal=EMPTY_FOLDER) for name in bare]
    if not entries:
        raise InputError(f"{uri} holds no files: check the path or prefix")
    return sorted(entries, key=lambda entry: entry.name)


def _list_s3(uri: str, depth: int | None) -> tuple[list[Entry], set[str]]:
    """Return the objects, and the names of the "folders" that a console made at the top."""
    bucket, key = s3.parse(uri)
    prefix = f"{key.rstrip('/')}/" if key.rstrip("/") else ""
    entries: list[Entry] = []
    folders: set[str] = set()
    for found in s3.list_objects(bucket, prefix):
        name = found.key[len(prefix) :]
        if not name or name.endswith("/"):  # a "folder" marker of a console
            folders |= {name.partition("/")[0]} - {""}
            continue
        if depth is not None and name.count("/") > depth:
            continue
        refusal = "" if _is_plain(name) else "its key holds '..', '\\' or an empty part: rename it"
        entries.append(Entry(name, f"s3://{bucket}/{found.key}", found.size, found.etag, refusal))
        if len(entries) > MAX_ENTRIES:
            raise InputError(f"{uri} holds over {MAX_ENTRIES} files: name a narrower prefix")
    return entries, folders


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise InputError(f"{path} can't be followed: {error}") from error


def _list_local(uri: str, depth: int | None) -> tuple[list[Entry], set[str]]:
    """Return the files, and the names of the folders at the top."""
    root = _resolved(local_path(uri))
    if not root.exists():
        raise InputError(f"there is no folder {uri}: check the path")
    if not root.is_dir():
        raise InputError(f"{uri} is a file, not a folder: give the folder that holds it")
    entries: list[Entry] = []
    top: set[str] = set()
    folders = [(root, "")]
    while folders:
        folder, below = folders.pop()
        try:
            children = list(os.scandir(folder))
        except OSError as error:
            raise InputError(f"can't read the folder {folder}: {error.strerror}") from error
        for child in children:
            name = below + child.name
            if child.is_dir() and not child.is_symlink():
                top |= {name} if not below else set()
                if depth is None or name.count("/") < depth:
                    folders.append((Path(child.path), name + "/"))
            else:
                entries.append(_local_entry(root, Path(child.path), name))
        if len(entries) > MAX_ENTRIES:
            raise InputError(f"{uri} holds over {MAX_ENTRIES} files: name a narrower folder")
    return entries, top


def _local_entry(root: Path, path: Path, name: str) -> Entry:
    """Describe a file without opening it; links may point to files of the same folder only."""
    refusal, size = "", 0
    try:
        target = path.resolve(strict=True)
        status = target.stat()
        size = status.st_size
        if target.is_dir():
            refusal = FOLDER_LINK
        elif not target.is_relative_to(root):
            refusal = "is a link that leaves the folder: put a copy of the file in its place"
        elif not stat.S_ISREG(status.st_mode):
            refusal = "is not an ordinary file: remove it"
    except (OSError, RuntimeError):
        refusal = "is a link to nowhere: remove it or put the file in its place"
    return Entry(name, str(path), size, refusal=refusal)


def exists(uri: str) -> bool:
    """Return whether a file is there (or, on S3, any object below the prefix)."""
    if is_s3(uri):
        bucket, key = s3.parse(uri)
        return s3.has_any(bucket, key)
    return local_path(uri).exists()


def find(uri: str) -> Entry | None:
    """Return the entry of one file, or None when it is not there."""
    if is_s3(uri):
        bucket, key = s3.parse(uri)
        found = s3.find(bucket, key)
        return Entry(key.rpartition("/")[2], uri, found.size, found.etag) if found else None
    path = local_path(uri)
    return _local_entry(_resolved(path.parent), path, path.name) if path.is_file() else None


def fetch(entry: Entry, cache: Path | None = None) -> Path:
    """Return a local path with an entry's bytes; S3 objects come through the cache, verified.

    Raises InputError when the entry must not or can no longer be read or keeps arriving
    damaged, ServiceError when the service is out of reach or the disk is full.
    """
    if entry.refusal:
        raise InputError(f"{entry.name} {entry.refusal}")
    if not is_s3(entry.uri):
        return local_path(entry.uri)
    bucket, key = s3.parse(entry.uri)
    store = ContentCache(cache_root(cache))
    source = "\n".join((s3.endpoint(), bucket, key, entry.etag or "", str(entry.size)))
    found = store.find(source, entry.size) if entry.etag else None
    if found is not None:
        return found
    with store.download() as temporary:
        sha256 = s3.download(bucket, key, temporary, size=entry.size, etag=entry.etag)
        return store.keep(temporary, sha256, source)


def fetch_all(
    entries: Sequence[Entry], cache: Path | None = None, *, workers: int = WORKERS
) -> list[Path]:
    """Fetch entries in parallel, in their order; the first error stops it."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(fetch, entry, cache) for entry in entries]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def put_folder(folder: Path, uri: str, *, workers: int = WORKERS) -> int:
    """Copy every file below ``folder`` to ``uri`` and return how many.

    Uploads carry their sha256, which a later fetch verifies. A file that replaces another
    on disk does so by rename.
    """
    entries = list_folder(str(folder))
    refused = [entry for entry in entries if entry.refusal]
    if refused:
        raise InputError(f"{folder}/{refused[0].name} {refused[0].refusal}")
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda entry: _put(Path(entry.uri), join(uri, entry.name)), entries))
    return len(entries)


def _put(path: Path, uri: str) -> None:
    if is_s3(uri):
        bucket, key = s3.parse(uri)
        s3.upload(path, bucket, key, sha256=file_sha256(path))
        return
    with replacing(local_path(uri)) as temporary:
        shutil.copyfile(path, temporary)


@contextmanager
def fetched_folder(uri: str, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a folder as a local one; from S3 the files whose names are `wanted` are fetched.

    Raises InputError when it is missing, ServiceError when S3 is out of reach.
    """
    if not is_s3(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="echodistill-folder-") as work:
        entries = [entry for entry in list_folder(uri) if wanted(entry.name)]
        for entry, path in zip(entries, fetch_all(entries), strict=True):
            target = Path(work) / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        yield Path(work)


def is_local_model(ref: str) -> bool:
    """Tell a model on this machine, the pocket pair's parts among them, from S3's and the hub's."""
    if is_s3(ref):
        return False
    is_path = "://" in ref or ref.startswith(("/", ".", "~", _POCKET))
    return is_path or not hub.is_hub_id(ref) or Path(ref).is_dir()


def resolve_model(ref: str, *, cache: Path | None = None) -> Path:
    """Return a local directory for a model: path, ``s3://`` prefix, hub id, ``pocket:<part>``.

    A hub id may pin a revision (``org/name@revision``). Only configuration, tokenizer and
    safetensors files are ever downloaded. Raises InputError for what does not exist and
    ServiceError when S3 or the hub is out of reach.
    """
    if is_s3(ref):
        return _model_from_s3(ref, cache)
    if ref.startswith(_POCKET):
        return _pocket_part(ref)
    if is_local_model(ref):
        path = local_path(ref)
        if not path.is_dir():
            raise InputError(
                f"there is no model {ref}: give a directory, s3:// prefix or hub id (org/name)"
            )
        return path.resolve()
    return hub.download(ref)


def _pocket_part(ref: str) -> Path:
    from model.pocket import pocket_paths

    paths = pocket_paths()
    part = getattr(paths, ref.removeprefix(_POCKET), None)
    if not isinstance(part, Path):
        raise InputError(
            f"the pocket pair has no part {ref}: its parts are teacher, student, clip, dino"
        )
    return part


def _model_from_s3(ref: str, cache: Path | None) -> Path:
    entries = [entry for entry in list_folder(ref) if hub.is_model_file(entry.name)]
    if not any(entry.name.endswith(".safetensors") for entry in entries):
        raise InputError(f"{ref} holds no .safetensors weights: upload a safetensors model there")
    refused = [entry for entry in entries if entry.refusal]
    if refused:
        raise InputError(f"{refused[0].uri}: {refused[0].refusal}")
    identity = "\n".join(f"{e.name}\t{e.uri}\t{e.etag}\t{e.size}" for e in entries)
    root = cache_root(cache)
    target = root / "models" / s3.text_sha256(f"{s3.endpoint()}\n{identity}")
    if target.is_dir():
        return target
    paths = fetch_all(entries, cache)
    with replacing_folder(target) as temporary:
        for entry, path in zip(entries, paths, strict=True):
            place = temporary / entry.name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, place)
    return target


__all__ = [
    "Entry",
    "disk_error",
    "exists",
    "fetch",
    "fetch_all",
    "fetched_folder",
    "find",
    "is_s3",
    "join",
    "list_folder",
    "local_path",
    "parent_and_name",
    "put_folder",
    "resolve_model",
]
