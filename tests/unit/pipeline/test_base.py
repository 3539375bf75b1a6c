"""`--base`: names and folders."""

import json
from pathlib import Path

import pytest

from components.spec import resolve_spec
from model.errors import InputError
from pipeline.base import base_settings


def own_base(folder: Path) -> Path:
    for part in ("clip", "dino", "teacher"):
        (folder / part).mkdir(parents=True)
    for part, config in {
        "unet": {"sample_size": 24},
        "vae": {"block_out_channels": [8, 16, 16]},
    }.items():
        (folder / "student" / part).mkdir(parents=True)
        (folder / "student" / part / "config.json").write_text(json.dumps(config))
    return folder


def test_names_of_presets_pass_through() -> None:
    assert base_settings(None) == (None, [])
    assert base_settings("sd-turbo") == ("sd-turbo", [])


def test_a_folder_fills_the_spec(tmp_path: Path) -> None:
    folder = own_base(tmp_path / "My Base: 1")
    preset, sets = base_settings(str(folder))
    spec = resolve_spec(preset, None, sets)
    assert spec.base.name == "my-base--1"
    assert spec.base.teacher == str(folder / "teacher")
    assert spec.base.student == str(folder / "student")
    assert spec.base.identity == spec.base.metric_clip == str(folder / "clip")
    assert spec.base.metric_dino == str(folder / "dino")
    assert spec.base.backbones == (str(folder / "clip"), str(folder / "dino"))
    assert spec.resolution == 24 * 4


def test_a_folder_never_takes_the_name_of_a_preset(tmp_path: Path) -> None:
    _, sets = base_settings(str(own_base(tmp_path / "pocket")))
    assert resolve_spec(None, None, sets).base.name == "own-pocket"


@pytest.mark.parametrize("lacking", ["teacher", "student", "clip", "dino"])
def test_a_folder_that_lacks_a_part_is_refused(tmp_path: Path, lacking: str) -> None:
    folder = own_base(tmp_path / "base")
    (folder / lacking).rename(folder / "elsewhere")
    with pytest.raises(InputError, match=f"has no {lacking}/"):
        base_settings(str(folder))


def test_a_student_that_is_no_model_is_refused(tmp_path: Path) -> None:
    folder = own_base(tmp_path / "base")
    (folder / "student" / "unet" / "config.json").write_text("{")
    with pytest.raises(InputError, match="not a diffusers model"):
        base_settings(str(folder))


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(InputError, match="there is no base 'pokcet'.*pocket"):
        base_settings("pokcet")
