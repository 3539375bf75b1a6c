"""The pocket base pair that ships with the project, unpacked to ordinary model folders.

The weights lie here in 8 bits (`storage.py`); `pocket_paths` writes them once, as fp16 diffusers
and transformers folders, under ECHODISTILL_CACHE. The installation itself is never written to.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from model.errors import ServiceError

if TYPE_CHECKING:  # torch takes seconds, and only who is the first to ask unpacks anything
    from torch import Tensor

_HERE = Path(__file__).parent
_UNET = "diffusion_pytorch_model.safetensors"
_TRANSFORMER = "model.safetensors"


@dataclass(frozen=True)
class PocketPaths:
    """Where the parts of the pocket pair are.

    Attributes:
        teacher: diffusers folder, v-prediction, DDIM.
        student: diffusers folder of the one-step model; shares all but the UNet with the teacher.
        clip: CLIPModel folder (text and vision tower), tokenizer and image processor.
        dino: ViTModel folder, self-supervised, with its image processor.
        concepts: sample concepts, `<id>/00.png ..` and `concept.yaml`.
    """

    teacher: Path
    student: Path
    clip: Path
    dino: Path
    concepts: Path


@cache
def content_id() -> str:
    """Name of this version of the pair: sha256 over its packed files and folder skeleton."""
    digest = hashlib.sha256()
    for path in sorted((*(_HERE / "weights").iterdir(), *(_HERE / "layout").rglob("*"))):
        if path.is_file():
            digest.update(f"{path.relative_to(_HERE).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def pocket_paths() -> PocketPaths:
    """The pair's folders, unpacked on first use (atomic rename; safe with many processes).

    Raises:
        ServiceError: when the cache folder cannot be written or its disk is full.
    """
    base = os.environ.get("ECHODISTILL_CACHE") or Path.home() / ".cache" / "echodistill"
    root = Path(base) / f"pocket-{content_id()}"
    if not root.exists():
        try:
            _unpack_to(root)
        except (OSError, SafetensorError) as error:  # a full disk is the one or the other
            why = getattr(error, "strerror", None) or str(error)
            raise ServiceError(
                f"The pocket pair cannot be unpacked to {root} ({why}): make "
                "room there, or set ECHODISTILL_CACHE to a folder that can be written."
            ) from error
    return PocketPaths(
        root / "teacher", root / "student", root / "clip", root / "dino", _HERE / "concepts"
    )


def _unpack_to(root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".pocket-", dir=root.parent))
    try:
        _copy_layout(work)
        for path in (work / "teacher" / "tokenizer").iterdir():  # the CLIP tower has the same one
            shutil.copyfile(path, work / "clip" / path.name)
        _write(work / "teacher" / "unet" / _UNET, _stored("teacher"))
        _write(work / "student" / "unet" / _UNET, _stored("student"))
        _write(work / "teacher" / "vae" / _UNET, _stored("vae"))
        clip = _stored("clip")
        _write(work / "clip" / _TRANSFORMER, clip)
        tower = {name: value for name, value in clip.items() if name.startswith("text_model.")}
        _write(work / "teacher" / "text_encoder" / _TRANSFORMER, tower)
        _write(work / "dino" / _TRANSFORMER, _stored("vit"))
        for part in ("vae", "text_encoder", "tokenizer"):
            (work / "student" / part).symlink_to(Path("..") / "teacher" / part)
        work.chmod(0o755)
        try:
            work.rename(root)
        except OSError:
            if not root.exists():  # else another process was first, with the same files
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _copy_layout(work: Path) -> None:
    """Contents only: a read-only installation's modes would stop us in our own folder."""
    layout = _HERE / "layout"
    for path in layout.rglob("*"):
        if path.is_file():
            copy = work / path.relative_to(layout)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _stored(name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    from model.pocket.storage import unpack

    return unpack(load_file(_HERE / "weights" / f"{name}.safetensors"))


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
