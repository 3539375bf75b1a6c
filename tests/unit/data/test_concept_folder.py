"""Concept folders on disk: what passes, and what is said of everything that does not."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.ingest import concept_folder as concept_folder_module
from components.ingest import pictures
from components.ingest.concept_folder import (
    CheckedConcept,
    check_prefix,
    concept_digest,
    load_images,
)
from model import METHOD_VERSION
from model.errors import InputError
from tests.unit.data.pictures import concept_folder, encoded, photo

# 20 subjects of the DreamBooth dataset, which is not part of this repository.
DREAMBENCH = Path(
    os.environ.get("DREAMBENCH", Path(__file__).parents[4] / "shared" / "data" / "dreambench")
)


def check_one(prefix: Path) -> CheckedConcept:
    found = check_prefix(str(prefix))
    assert len(found) == 1, [item.id for item in found]
    return found[0]


def only_problem(prefix: Path) -> str:
    found = check_one(prefix)
    assert not found.valid and found.concept is None
    assert len(found.problems) == 1, found.problems
    return found.problems[0]


def test_a_good_concept_has_all_its_facts(tmp_path: Path) -> None:
    folder = concept_folder(
        tmp_path,
        "corgi-1",
        facts="class_noun: dog\ntoken: <sks>\ninitializer: corgi\nlive: true\n"
        "captions:\n  01.jpg: a <sks> dog on a sofa\n",
    )
    (folder / "notes.txt").write_text("not an image")
    (folder / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "LICENSE.md").write_text("CC BY")
    found = check_one(tmp_path)
    assert found.valid and found.problems == () and found.n_images == 3
    concept = found.concept
    assert concept is not None
    assert (concept.id, concept.class_noun, concept.token) == ("corgi-1", "dog", "<sks>")
    assert (concept.initializer, concept.live) == ("corgi", True)
    assert [image.name for image in concept.images] == ["00.jpg", "01.jpg", "02.jpg"]
    assert [image.caption for image in concept.images] == [None, "a <sks> dog on a sofa", None]
    assert {(image.width, image.height) for image in concept.images} == {(96, 80)}
    assert pickle.loads(pickle.dumps(concept)) == concept


def test_defaults_come_from_the_class_noun(tmp_path: Path) -> None:
    concept_folder(tmp_path, "bear", facts="class_noun: stuffed animal")
    concept_folder(tmp_path, "rex", facts="class_noun: dog")
    bear, rex = (item.concept for item in check_prefix(str(tmp_path)))
    assert bear is not None and rex is not None
    assert (bear.token, bear.initializer, bear.live) == ("<new1>", "animal", False)
    assert (rex.initializer, rex.live) == ("dog", True)


def test_one_folder_of_images_is_one_concept_with_the_facts_beside(tmp_path: Path) -> None:
    folder = concept_folder(tmp_path, "dog6", facts="")
    concept_folder(tmp_path, "cat", facts="")
    (tmp_path / "classes.json").write_text(json.dumps({"dog6": "dog", "cat": "cat"}))
    for uri in (str(folder), f"{folder}/", folder.as_uri()):
        found = check_prefix(uri)
        assert [(item.id, item.valid, item.class_noun) for item in found] == [("dog6", True, "dog")]


def test_own_facts_win_over_concepts_yaml_over_classes_json(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        concept_folder(tmp_path, name, facts="class_noun: own" if name == "one" else "")
    (tmp_path / "classes.json").write_text(json.dumps({"one": "c", "two": "c", "three": "c"}))
    (tmp_path / "concepts.yaml").write_text("one: y\ntwo: {class_noun: y, live: true}\n")
    found = {item.id: item for item in check_prefix(str(tmp_path))}
    nouns = {name: item.class_noun for name, item in found.items()}
    assert nouns == {"one": "own", "two": "y", "three": "c"}
    two = found["two"].concept
    assert two is not None and two.live


def write_png_header_only(path: Path, width: int, height: int) -> None:
    """A PNG that claims a size and holds almost no data: a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))


def frames(kind: str) -> bytes:
    return encoded(photo(), kind, save_all=True, append_images=[photo(seed=1), photo(seed=2)])


BAD_FILES = {
    "empty.jpg": (b"", "is empty"),
    "text.jpg": (b"hello, I am no image at all" * 10, "is not a JPEG image"),
    "really_png.jpg": (encoded(photo(), "PNG"), "is a PNG image behind a JPEG suffix"),
    "really_gif.png": (encoded(photo(), "GIF"), "is a GIF image behind a PNG suffix"),
    "half.jpg": (encoded(photo())[:-1500], "is damaged or cut off"),
    "half.png": (encoded(photo(), "PNG")[:-5000], "is damaged or cut off"),
    "half.webp": (encoded(photo(), "WEBP")[:-500], "is damaged or cut off"),
    "header.jpg": (encoded(photo())[:30], "upload it again"),
    "tiny.jpg": (encoded(photo(63, 200)), "is 63 x 200 pixels: use one of at least 64"),
    "moving.webp": (frames("WEBP"), "is an animation"),
    "moving.png": (frames("PNG"), "is an animation"),
    "moving.gif": (frames("GIF"), "this type of image is not read: convert it"),
    "phone.heic": (b"ftypheic", "this type of image is not read: convert it"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_image_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    data, expected = BAD_FILES[name]
    folder = concept_folder(tmp_path, "dog")
    (folder / name).write_bytes(data)
    problem = only_problem(tmp_path)
    assert problem.startswith(f"{name}: ") and expected in problem


@pytest.mark.parametrize("size", [(8000, 6251), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_decoding(self: Image.Image) -> None:
        raise AssertionError("pixels were decoded")

    folder = concept_folder(tmp_path, "dog", n_images=0)
    write_png_header_only(folder / "bomb.png", *size)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", no_decoding)
    problem = only_problem(tmp_path)
    assert problem.startswith("bomb.png: ") and "50 megapixels: scale it down" in problem


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_bytes_that_are_damaged_anyhow_never_stop_the_check(kind: str) -> None:
    """What passes the check can be decoded; whatever else comes is said, not raised."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 5
    whole = encoded(photo(), kind, exif=exif)
    said = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 400), rng.integers(1, 6)):
            data[place] = rng.integers(0, 256)
        if rng.random() < 0.3:
            data = data[: rng.integers(1, len(data))]
        found = pictures.check(bytes(data), f"x.{kind.lower()}")
        if isinstance(found, str):
            said += 1
        else:
            assert pictures.decode(bytes(data)).size == (found.width, found.height)
    assert said > 20


def test_every_problem_of_every_concept_is_said_at_once(tmp_path: Path) -> None:
    good = concept_folder(tmp_path, "good")
    bad = concept_folder(tmp_path, "Bad Name", facts="clas_noun: dog\ntoken: new1\nlive: maybe\n")
    (bad / "99.png").write_bytes(b"junk")
    concept_folder(tmp_path, "nameless", facts="")
    concept_folder(tmp_path, "empty", n_images=0)
    concept_folder(tmp_path, "many", n_images=65)
    deep = concept_folder(tmp_path, "deep", n_images=0)
    (deep / "photos").mkdir()
    (good / "00.jpg").rename(deep / "photos" / "00.jpg")
    found = {item.id: item for item in check_prefix(str(tmp_path))}
    assert [name for name, item in found.items() if item.valid] == ["good"]
    said = "\n".join(found["Bad Name"].problems)
    for expected in (
        "Bad Name: a concept id is a-z",
        "concept.yaml: unknown key 'clas_noun': did you mean `class_noun`?",
        "concept.yaml: `token` must look like <new1>",
        "concept.yaml: `live` must be true or false, not 'maybe'",
        "99.png: is not a PNG image",
    ):
        assert expected in said
    # A class noun that is there under a wrong key is not missing as well.
    assert len(found["Bad Name"].problems) == 5
    assert found["nameless"].problems == (
        "the class noun is missing: write `class_noun: dog` into concept.yaml beside the images, "
        "or the concept into concepts.yaml or classes.json beside the folders",
    )
    assert found["empty"].problems == (
        "empty: has no images: add 1 to 64 photos (jpg, png or webp)",
    )
    assert found["many"].problems == ("many: has 65 images: keep the best 64 or fewer",)
    assert found["many"].n_images == 65
    assert found["deep"].problems[0].startswith("photos/00.jpg: images in a subfolder")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("class_noun: [", "line 1 is not YAML"),
        ("just words", "must be a table"),
        ("- a\n- b", "must be a table"),
        ("class_noun: dog\nclass_noun: cat", "line 2 names 'class_noun' again"),
        ("class_noun: &a dog\ninitializer: *a", "line 2 uses an alias"),
        ("class_noun: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("class_noun: no", "`class_noun` must be text such as `dog`, not False"),
        ("class_noun: '<new1> dog'", "`class_noun` must be ordinary words"),
        ("class_noun: dog\ninitializer: 5", "`initializer` must be text"),
        ("class_noun: dog\ncaptions: [a]", "`captions` must be a table"),
        ("class_noun: dog\ncaptions: {00.jpg: 3}", "the caption of '00.jpg' must be text"),
        ("class_noun: dog\ncaptions: {07.jpg: a dog}", "has a caption for 07.jpg"),
        ("class_noun: dog\ncolour: red", "unknown key 'colour': known keys are class_noun"),
        ("class_noun: dog\n? {a: b}\n: c", "is not"),
        ("a: " + "[" * 3000, "is nested too deeply"),
    ],
)
def test_a_malformed_concept_yaml_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    concept_folder(tmp_path, "dog", facts=text)
    found = check_one(tmp_path)
    assert any(p.startswith("concept.yaml: ") and expected in p for p in found.problems), (
        found.problems
    )


def test_concept_yaml_in_another_encoding_or_under_another_name(tmp_path: Path) -> None:
    folder = concept_folder(tmp_path, "dog")
    (folder / "concept.yaml").write_bytes("class_noun: \xff".encode("utf-16"))
    assert any("UTF-8" in problem for problem in check_one(tmp_path).problems)
    (folder / "concept.yaml").rename(folder / "concept.yml")
    assert "concept.yml: is not read: rename it to concept.yaml" in check_one(tmp_path).problems


def test_a_broken_entry_beside_the_folders_concerns_its_concept_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        concept_folder(tmp_path, name, facts="")
    (tmp_path / "concepts.yaml").write_text("a: {class_nuon: dog}\nb: cat\nc: dog\n")
    found = {item.id: item for item in check_prefix(str(tmp_path))}
    assert found["b"].valid
    assert found["a"].problems[0].startswith("concepts.yaml: a: unknown key 'class_nuon'")
    assert found["c"].problems == (
        "c: is named beside the folders but has none: add its folder of images",
    )


def test_a_broken_file_beside_the_folders_concerns_them_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        concept_folder(tmp_path, name)
    (tmp_path / "classes.json").write_text('{"a": "dog", "a": "cat"}')
    for item in check_prefix(str(tmp_path)):
        assert item.problems == ("classes.json: names 'a' twice: remove one",)
    (tmp_path / "classes.json").write_text('{"a": "dog"')
    for item in check_prefix(str(tmp_path)):
        assert item.problems[0].startswith("classes.json: line 1 is not JSON")


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = concept_folder(tmp_path, "secret")
    prefix = tmp_path / "prefix"
    folder = concept_folder(prefix, "dog")
    (folder / "inside.jpg").symlink_to(folder / "00.jpg")
    assert check_one(prefix).n_images == 4 and check_one(prefix).valid
    (folder / "leak.jpg").symlink_to(outside / "00.jpg")
    (folder / "nowhere.jpg").symlink_to(tmp_path / "nothing.jpg")
    (prefix / "whole").symlink_to(outside)
    os.mkfifo(folder / "pipe.png")
    found = {item.id: item for item in check_prefix(str(prefix))}
    assert len(found["dog"].problems) == 3
    said = "\n".join(found["dog"].problems)
    assert "leak.jpg: is a link that leaves the folder" in said
    assert "nowhere.jpg: is a link to nowhere" in said
    assert "pipe.png: is not an ordinary file" in said
    assert "whole: is a link to a folder, which is not followed" in found["whole"].problems[0]
    # The prefix itself may be a link: the user named it.
    (tmp_path / "alias").symlink_to(prefix)
    (folder / "leak.jpg").unlink()
    assert {item.id for item in check_prefix(str(tmp_path / "alias"))} == {"dog", "whole"}


def test_a_folder_without_files_is_a_concept_without_images(tmp_path: Path) -> None:
    concept_folder(tmp_path, "fox")
    (tmp_path / "bare" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    found = {one.id: one for one in check_prefix(str(tmp_path))}
    assert found.keys() == {"bare", "fox"} and found["fox"].valid
    assert found["bare"].problems == ("bare: has no images: add 1 to 64 photos (jpg, png or webp)",)


def test_a_wrong_prefix_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.txt").write_text("x")
    for uri, expected in {
        str(tmp_path / "no"): "there is no folder",
        str(tmp_path / "empty"): "holds no files",
        str(tmp_path / "flat"): "holds no concept folders: put each concept's images into",
        str(tmp_path / "flat" / "a.txt"): "is a file, not a folder",
        "ftp://host/x": "neither a path, file:///... nor s3://",
        "file://host/x": "neither a path",
        "": "names no file or folder",
        "s3://": "names no bucket",
        "s3:///prefix": "names no bucket",
    }.items():
        with pytest.raises(InputError, match="(?s).") as caught:
            check_prefix(uri)
        assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_problems(tmp_path: Path) -> None:
    folder = concept_folder(tmp_path, "dog")
    (folder / "00.jpg").chmod(0)
    assert "can't be read (Permission denied)" in only_problem(tmp_path)


def test_a_phone_photo_with_a_second_picture_inside_is_a_jpeg(tmp_path: Path) -> None:
    folder = concept_folder(tmp_path, "dog", n_images=0)
    (folder / "phone.jpg").write_bytes(frames("MPO"))
    found = check_one(tmp_path)
    assert found.valid, found.problems


def test_orientation_colours_and_transparency(tmp_path: Path) -> None:
    folder = concept_folder(tmp_path, "dog", n_images=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    picture = photo(120, 70)
    picture.paste((255, 0, 0), (0, 0, 40, 70))  # left as stored is the top when upright
    (folder / "a.jpg").write_bytes(encoded(picture, exif=exif, quality=95))
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(folder / "b.png")
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(folder / "c.jpg")
    Image.new("I;16", (64, 64), 65535 // 2).save(folder / "d.png")
    Image.new("P", (64, 64), 0).save(folder / "e.png")
    concept = check_one(tmp_path).concept
    assert concept is not None
    assert (concept.images[0].width, concept.images[0].height) == (70, 120)
    upright, clear, cmyk, deep, palette = load_images(concept)
    assert upright.shape == (3, 120, 70)
    top, bottom = upright[:, :30].float().mean((1, 2)), upright[:, -30:].float().mean((1, 2))
    assert top[0] > 240 and top[1] < 20 and bottom[1] > 50
    assert clear.min() == 255
    assert cmyk[0].float().mean() > 200 and cmyk[1].float().mean() < 40
    assert abs(deep.float().mean() - 127) < 2
    assert palette.shape == (3, 64, 64)


def test_load_images_shrinks_to_the_shorter_side(tmp_path: Path) -> None:
    folder = concept_folder(tmp_path, "dog", n_images=1)
    (folder / "wide.png").write_bytes(encoded(photo(300, 100), "PNG"))
    concept = check_one(tmp_path).concept
    assert concept is not None
    assert [tuple(x.shape) for x in load_images(concept, shorter_side=80)] == [
        (3, 80, 96),
        (3, 80, 240),
    ]


def test_an_image_that_changed_after_the_check_is_refused(tmp_path: Path) -> None:
    folder = concept_folder(tmp_path, "dog")
    concept = check_one(tmp_path).concept
    assert concept is not None
    (folder / "01.jpg").write_bytes(encoded(photo(seed=77)))
    with pytest.raises(InputError, match="changed since it was checked"):
        load_images(concept)
    (folder / "01.jpg").unlink()
    with pytest.raises(InputError, match="can't be read on this machine"):
        load_images(concept)


def test_the_digest_covers_what_training_depends_on_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    concept_folder(tmp_path / "a", "dog", facts="class_noun: dog")
    concept_folder(tmp_path / "b", "dog", facts="class_noun: dog")
    one, two = check_one(tmp_path / "a").concept, check_one(tmp_path / "b").concept
    assert one is not None and two is not None
    assert one.digest == two.digest, "where a concept lies does not matter"
    image = one.images[0]
    for changed in (
        replace(one, id="dog2"),
        replace(one, class_noun="cat"),
        replace(one, token="<sks>"),
        replace(one, initializer="corgi"),
        replace(one, images=one.images[1:]),
        replace(one, images=(replace(image, caption="a dog"), *one.images[1:])),
        replace(one, images=(replace(image, sha256="0" * 64), *one.images[1:])),
    ):
        assert changed.digest != one.digest
    assert replace(one, live=not one.live).digest == one.digest
    digest = concept_digest(one, "spec", "base")
    assert digest == concept_digest(two, "spec", "base")
    others = [concept_digest(one, "x", "base"), concept_digest(one, "spec", "x")]
    monkeypatch.setattr(concept_folder_module, "METHOD_VERSION", METHOD_VERSION + 1)
    others.append(concept_digest(one, "spec", "base"))
    assert len({digest, *others}) == 4


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="DREAMBENCH names no folder")
def test_dreambench_passes() -> None:
    found = check_prefix(str(DREAMBENCH))
    assert len(found) == 20 and all(item.valid for item in found)
    assert {item.id: item.class_noun for item in found} == json.loads(
        (DREAMBENCH / "classes.json").read_text()
    )
