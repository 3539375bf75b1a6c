"""The benchmark of whole batches: the base that it writes, and what it reads off the host."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from components.spec import resolve_spec
from components.train.job import BasePaths
from components.train.worker import load_frozen
from model.errors import InputError
from model.metrics import load_clip_text
from pipeline.bench_bases import MINI
from tests.bench import batch_on_gpus as bench
from tests.bench.random_base import settings_of, write_base


def test_a_base_of_random_weights_is_loaded_like_any_other(tmp_path: Path) -> None:
    write_base(tmp_path, MINI, torch.device("cpu"))
    with pytest.raises(InputError, match="give another folder"):
        write_base(tmp_path, MINI, torch.device("cpu"), seed=1)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_base(tmp_path, MINI, torch.device("cpu"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written

    spec = resolve_spec("sd-turbo", None, settings_of(tmp_path, MINI))
    device = torch.device("cpu")
    frozen = load_frozen(BasePaths.from_spec(spec), torch.float32, device, resolution=64)
    assert [each.name for each in frozen.backbones] == ["dino", "dinov2", "clip"]
    assert frozen.identity is frozen.backbones[2]
    pair = frozen.pair
    assert pair.teacher_kv.shape == pair.student_kv.shape
    assert not torch.equal(pair.teacher_kv, pair.student_kv)
    metric_clip = spec.base.metric_clip
    assert load_clip_text(Path(metric_clip))(["a dog"]).shape == (1, 32)


def test_cores_and_memory_are_those_between_two_moments() -> None:
    watch = bench.Watch(["0"])
    gib = bench.measure.GIB
    watch._looks = [
        (float(t), {"workers": (2.0 * t, t * gib, 2), "others": (0.5 * t, gib, 9)}, [1024.0 * t])
        for t in range(10)
    ]
    assert watch.during(2.0, 6.5) == {
        "looks": 5,
        "workers": {"processes": 2, "cores": 2.0, "gib": 6.0},
        "others": {"processes": 9, "cores": 0.5, "gib": 1.0},
        "gpu_gib": [6.0],
    }
    watch._looks.insert(4, (3.5, watch._looks[3][1], []))  # nvidia-smi did not answer
    assert watch.during(2.0, 6.5)["looks"] == 5
    assert watch.during(2.0, 2.5) == {"looks": 1}


def test_what_failed_is_measured_again_and_what_is_there_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def batch(options: object, sets: list[str], count: int) -> bench.Document:
        measured.append(count)
        row = {"gpus": count, "seconds": 1.0, "states": {}, "processes": []}
        fails = measured == [1, 2]
        return row if fails else {**row, "concepts_per_hour": 10.0 * count}

    def run() -> int:
        words = ["batch", "--gpus", "1,2", "--base", MINI, "--device", "cpu"]
        monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path)])
        return bench.main()

    monkeypatch.setattr(bench, "batch", batch)
    based = SimpleNamespace(returncode=0)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: based)  # the base's process
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # it sets them; this takes that back
    assert run() == 1
    assert run() == 0
    assert run() == 0
    assert measured == [1, 2, 2]
    assert "bar [10.0, 20.0]" in (tmp_path / "batch.mmd").read_text()
