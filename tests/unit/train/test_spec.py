"""The run spec: what wins over what, what a digest covers, and one sentence for every mistake."""

from __future__ import annotations

import pytest

from components.spec import (
    RunSpec,
    TrainSpec,
    preset_names,
    resolve_spec,
    spec_digest,
    spec_yaml,
)
from model.errors import InputError
from model.settings import LossSettings


def test_sd_turbo_has_the_methods_values():
    spec = resolve_spec("sd-turbo")
    assert spec.loss == LossSettings()
    assert (spec.resolution, spec.batch_size, spec.train.iterations) == (512, 2, 1000)
    assert (spec.train.teacher_lr, spec.train.head_lr, spec.train.weight_decay) == (
        1e-5,
        1e-4,
        0.01,
    )
    assert spec.train.scale_lr and spec.train.clip_norm == 1.0
    assert (spec.echo.samples, spec.echo.rounds, spec.echo.share) == (16, 2, 0.5)


def test_set_wins_over_file_wins_over_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: sd-turbo\ntrain:\n  iterations: 7\n  zero_stage: 1\nseed: 3\n")
    spec = resolve_spec(None, file, ["train.zero_stage=3", "train.teacher_lr=1e-4"])
    assert (spec.base.name, spec.train.iterations, spec.train.zero_stage) == ("sd-turbo", 7, 3)
    assert (spec.seed, spec.train.teacher_lr, spec.train.head_lr) == (3, 1e-4, 1e-4)
    assert resolve_spec("pocket", file).base.name == "pocket"


@pytest.mark.parametrize("preset", preset_names())
def test_a_resolved_spec_reads_back_equal(tmp_path, preset):
    spec = resolve_spec(preset, None, ["train.workers=4", "loss.perceptual=lpips"])
    file = tmp_path / "resolved.yaml"
    file.write_text(spec_yaml(spec))
    assert resolve_spec(None, file) == spec


def test_a_setting_that_comes_later_changes_no_digest():
    class LaterTrainSpec(TrainSpec):
        warm_up: int = 0

    class LaterSpec(RunSpec):
        train: LaterTrainSpec = LaterTrainSpec()
        speed: float = 1.0

    for preset in preset_names():
        spec = resolve_spec(preset)
        later = LaterSpec.model_validate(spec.model_dump())
        assert spec_digest(later) == spec_digest(spec)
        assert spec_digest(later.model_copy(update={"speed": 2.0})) != spec_digest(spec)


def test_the_digest_covers_what_changes_the_result_and_nothing_else():
    def digest(*sets: str) -> str:
        return spec_digest(resolve_spec("pocket", None, sets))

    base = digest()
    for same in (
        "train.workers=2",
        "train.zero_stage=3",
        "train.storage_path=s3://a/b",
        "train.device=cuda",
        "train.checkpoint_seconds=1",
        "pack.size=9",
        "tracking.uri=http://x",
        "gate.max_drop=0.5",
        "evaluate.seeds=1",
        "cost.gpu_hour=2.5",
        "base.metric_clip=/other",
        # What they hold counts, not where they lie: `base_hash`.
        "base.teacher=/other",
        "base.backbones=[/other]",
        "train.checkpointing=true",
    ):
        assert digest(same) == base, same
    others = (
        "seed=1",
        "batch_size=4",
        "train.iterations=151",
        "train.token_lr=0.1",
        "train.precision=bf16",
        "train.optimizer=sgd",
        "loss.id_weight=0.5",
        "views.flip=0.1",
        "views.bank=64",
        "views.caption_probability=0.5",
        "method.follow=0.5",
        "echo.rounds=2",
        "adapter.rank=8",
        "adapter.rank=full",
        "adapter.max_picture_error=2",
    )
    assert len({digest(other) for other in others} | {base}) == len(others) + 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.iteratons=5", ("'train.iteratons'", "--set", "did you mean 'train.iterations'")),
        ("train.lr=1", ("did you mean 'train.teacher_lr'", "'train.student_lr'")),
        ("iterations=5", ("did you mean 'train.iterations'",)),
        ("loss.id_weigt=1", ("did you mean 'loss.id_weight'",)),
        ("base.teecher=a", ("did you mean 'base.teacher'",)),
        ("train.iterations=0", ("train.iterations = 0", "greater than or equal to 1")),
        ("train.iterations=many", ("train.iterations = 'many'", "valid integer")),
        ("train.zero_stage=4", ("train.zero_stage = 4",)),
        ("loss.perceptual=vgg", ("loss.perceptual = 'vgg'", "'swd' or 'lpips'")),
        ("echo.keep=4", ("echo.keep = 4", "--set echo.keep=4")),
        ("train=5", ("train = 5",)),
        ("adapter.rank=0", ("adapter.rank = 0", "--set", "auto, full or a whole number")),
        ("adapter.rank=low", ("adapter.rank = 'low'", "auto, full or a whole number")),
        ("adapter.ranks=8", ("did you mean 'adapter.rank'",)),
        ("base=pockt", ("did you mean 'pocket'",)),
        ("train.head_lr=.nan", ("train.head_lr",)),
        ("nothing", ("key=value",)),
        ("seed=[", ("not YAML: line 1, column 2",)),
    ],
)
def test_one_sentence_names_the_key_and_where_it_stands(setting, words):
    with pytest.raises(InputError) as caught:
        resolve_spec("pocket", None, [setting])
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    assert all(word in message for word in words), message


def test_a_mistake_in_a_file_is_found_there(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  iteratons: 5\n")
    with pytest.raises(InputError, match=r"mine\.yaml.*'train\.iterations'"):
        resolve_spec("pocket", file, ["seed=1"])
    file.write_text("train: [1\n")
    with pytest.raises(InputError, match=r"mine\.yaml is not YAML"):
        resolve_spec("pocket", file)
    file.write_text("- a\n")
    with pytest.raises(InputError, match="mapping"):
        resolve_spec("pocket", file)
    file.write_text("seed: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(InputError, match="not YAML"):
        resolve_spec("pocket", file)
    with pytest.raises(InputError, match="cannot be read"):
        resolve_spec("pocket", tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="did you mean 'sd-turbo'"):
        resolve_spec("sd_turbo")


def test_a_price_makes_a_cost():
    assert resolve_spec("pocket").cost.of(7200) is None
    assert resolve_spec("pocket", None, ["cost.gpu_hour=2.5"]).cost.of(7200) == 5.0
    with pytest.raises(InputError, match="cost.gpu_hour"):
        resolve_spec("pocket", None, ["cost.gpu_hour=-1"])
