"""Models from the Hugging Face hub: only files that loading from safetensors needs."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from components.ingest.cache import disk_error
from model.errors import InputError, ServiceError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# Weights in the root of a diffusers repository are single-file copies of its folders.
_WANTED = ("*.json", "*.txt", "*.model", "model*.safetensors", "*/*.safetensors")
_UNWANTED = ("*.fp16.*", "*.bf16.*", "*non_ema*", ".*", "*/.*", "onnx/*", "openvino/*")


def is_hub_id(ref: str) -> bool:
    """Return whether a text has the form ``org/name`` or ``org/name@revision``."""
    return _HUB_ID.fullmatch(ref) is not None


def is_model_file(name: str) -> bool:
    """Return whether a model's file is one that loading needs (never a pickle)."""
    wanted = any(fnmatch(name, pattern) for pattern in _WANTED)
    return wanted and not any(fnmatch(name, pattern) for pattern in _UNWANTED)


def download(ref: str) -> Path:
    """Return the local snapshot of a hub id, downloading what is missing.

    Raises InputError for an unknown, private or unsafe (no safetensors) repository and
    ServiceError when the hub is out of reach.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = ref.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
            etag_timeout=10,
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{repo} is gated on the hub: accept its terms there and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repo} has no revision {revision}: check it on the hub") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(
            f"the hub has no model {repo}, or it is private: check the id, or set HF_TOKEN"
        ) from error
    except _out_of_reach() as error:
        raise ServiceError(
            f"the hub is out of reach and {repo} is not in its cache: "
            "check the network, or give a local directory or s3:// prefix instead"
        ) from error
    except OSError as error:
        raise disk_error(error, "the hub's cache") from error
    path = Path(folder)
    if not any(path.rglob("*.safetensors")):
        raise InputError(f"{ref} has no .safetensors weights: name a revision or copy that has")
    return path


def _out_of_reach() -> tuple[type[Exception], ...]:
    import httpx
    from huggingface_hub import errors

    return (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.FileMetadataError,
        httpx.HTTPError,
        ConnectionError,
        TimeoutError,
    )
