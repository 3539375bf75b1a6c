"""`echodistill check` from outside: shapes, exit codes, and one sentence for what is wrong."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import S3Bucket
from tests.integration.pipeline.commands import Finished, run


def photo(path: Path, size: tuple[int, int] = (96, 128)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    folder = tmp_path / "concepts"
    for concept, noun in {"fox": "fox", "mug": "coffee mug"}.items():
        for number in range(3):
            photo(folder / concept / f"{number}.png")
        (folder / concept / "concept.yaml").write_text(f"class_noun: {noun}\n")
    return folder


def s3_environment(bucket: S3Bucket) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": bucket.endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def test_json_has_the_promised_shape(prefix: Path, tmp_path: Path) -> None:
    done = run("check", str(prefix), "--json", cwd=tmp_path)
    assert done.code == 0
    assert done.document == {
        "concepts": [
            {"id": "fox", "valid": True, "class_noun": "fox", "n_images": 3, "problems": []},
            {"id": "mug", "valid": True, "class_noun": "coffee mug", "n_images": 3, "problems": []},
        ]
    }


def test_one_bad_concept_is_told_and_does_not_stop_the_others(prefix: Path, tmp_path: Path) -> None:
    whole = (prefix / "fox" / "1.png").read_bytes()
    (prefix / "fox" / "1.png").write_bytes(whole[: len(whole) // 2])
    done = run("check", str(prefix), "--json", cwd=tmp_path)
    assert done.code == 1
    fox, mug = done.document["concepts"]
    assert not fox["valid"] and mug["valid"]
    assert len(fox["problems"]) == 1 and fox["problems"][0].startswith("1.png")
    table = run("check", str(prefix), cwd=tmp_path)
    assert table.code == 1
    assert "1.png" in table.stdout and "1 of 2 concepts are valid" in table.stdout


def test_concepts_on_s3(prefix: Path, tmp_path: Path, s3_bucket: S3Bucket) -> None:
    uri = s3_bucket.upload_folder(prefix, "some/concepts")
    done = run("check", uri, "--json", cwd=tmp_path, **s3_environment(s3_bucket))
    assert [c["valid"] for c in done.document["concepts"]] == [True, True]


def test_the_grid_shows_every_photo_and_its_views(prefix: Path, tmp_path: Path) -> None:
    words = ("check", str(prefix), "--grid", "views/grid.png", "--base", "sd-turbo", "--json")
    done = run(*words, cwd=tmp_path)
    assert done.code == 0 and done.document["grid"] == "views/grid.png"
    with Image.open(tmp_path / "views/grid.png") as sheet:
        assert sheet.size == (128 * 6, 2 * (3 * 128 + 20))
        grey = np.asarray(sheet.convert("L"))
    rows = np.stack([grey[20 : 20 + 384], grey[424 : 424 + 384]]).reshape(6, 128, 6, 128)
    photos, views = rows[:, :, 0], rows[:, :, 1:].swapaxes(1, 2)
    # From dark to light, as the photos are.
    assert (photos[:, :16] < 60).all() and (photos[:, -16:] > 195).all()
    assert (views.std(axis=(2, 3)) > 10).all()
    # This base's views are pasted on an empty canvas two times in three, pocket's never: what is
    # left empty does not count, so it is darkened.
    pasted = (views == 51).mean(axis=(2, 3)) > 0.02
    assert 0.4 < pasted.mean() < 0.9
    for view in views[pasted]:
        last, last_counted = (
            np.flatnonzero(here.any(axis=1))[-1] for here in (view != 51, view > 102)
        )
        assert 0 < last - last_counted <= 4, "a mask is as narrow as at this base's resolution"


def refused(done: Finished, code: int, *words: str) -> None:
    """One clear sentence on stderr, the same in the document, and no traceback."""
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.document["error"] == {"message": done.error, "exit_code": code}
    for word in words:
        assert word in done.error, done.error


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(run("check", "nowhere", "--json", cwd=tmp_path), 2, "nowhere")


def test_an_empty_prefix(tmp_path: Path, s3_bucket: S3Bucket) -> None:
    (tmp_path / "empty").mkdir()
    refused(run("check", "empty", "--json", cwd=tmp_path), 2, "empty")
    uri = f"{s3_bucket.uri}/nothing/here"
    done = run("check", uri, "--json", cwd=tmp_path, **s3_environment(s3_bucket))
    refused(done, 2, uri)


def test_a_wrong_bucket(tmp_path: Path, s3_bucket: S3Bucket) -> None:
    env = s3_environment(s3_bucket)
    refused(run("check", "s3://not-there/x", "--json", cwd=tmp_path, **env), 2, "not-there")


def test_no_credentials(tmp_path: Path, s3_bucket: S3Bucket) -> None:
    env = {"AWS_ENDPOINT_URL": s3_bucket.endpoint}
    done = run("check", f"{s3_bucket.uri}/x", "--json", cwd=tmp_path, **env)
    refused(done, 2, "credentials")


def test_no_server(tmp_path: Path, s3_bucket: S3Bucket) -> None:
    env = s3_environment(s3_bucket) | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = run("check", f"{s3_bucket.uri}/x", "--json", cwd=tmp_path, **env)
    refused(done, 3, "127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["chek"], "check"), (["check", "x", "--jso"], "--json"), (["check"], "PREFIX")],
)
def test_a_command_line_with_a_typo(tmp_path: Path, arguments: list[str], word: str) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.code == 2
    assert word in done.error
    assert done.stdout == ""


def test_a_full_disk_while_the_grid_is_written(prefix: Path, tmp_path: Path) -> None:
    import resource
    import subprocess
    import sys

    from tests.integration.pipeline.commands import environment

    process = subprocess.run(
        [sys.executable, "-m", "pipeline.cli.entry", "check", str(prefix), "--grid", "g.png"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        # A file may grow to 3 kB here; the system then says EFBIG, as a full quota does.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000)),
    )
    done = Finished(process.returncode, process.stdout, process.stderr)
    assert done.code == 3
    assert "g.png" in done.error and "disk" in done.error
    assert [p.name for p in tmp_path.iterdir() if "g.png" in p.name or "part" in p.name] == []


def test_help_names_every_option() -> None:
    done = run("check", "--help", cwd=Path("."))
    assert done.code == 0
    for option in ("--grid", "--base", "--spec", "--set", "--json", "--debug", "PREFIX"):
        assert option in done.stdout


def test_a_picture_with_an_orientation_is_drawn_upright(tmp_path: Path) -> None:
    """Red on top in the file, turned by its EXIF tag so that it is at the right."""
    pixels = Image.new("RGB", (100, 100), "blue")
    pixels.paste("red", (0, 0, 100, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", exif=exif, quality=95)
    (tmp_path / "turned").mkdir()
    (tmp_path / "turned" / "0.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "turned" / "concept.yaml").write_text("class_noun: flag\n")
    done = run("check", "turned", "--grid", "g.png", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    with Image.open(tmp_path / "g.png") as sheet:
        left, right = sheet.getpixel((16, 20 + 64)), sheet.getpixel((112, 20 + 64))
    assert left[2] > 200 > 60 > left[0]
    assert right[0] > 200 > 60 > right[2]
