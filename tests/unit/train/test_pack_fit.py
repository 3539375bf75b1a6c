"""What the caller of Ray Train makes of its errors."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError

from components.spec import resolve_spec
from components.train.job import BasePaths, PackJob
from components.train.pack import _fit, _reading
from model.errors import AwayError, ServiceError


@pytest.mark.parametrize("given", [ActorDiedError(), ControllerError(ActorDiedError())])
def test_a_node_that_dies_while_workers_start_is_rays_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Exception
) -> None:
    """So that a driver trains the pack once more; its concepts have not failed."""

    def fit(_: Any) -> None:
        raise given

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    spec = resolve_spec("pocket", None, ["train.device=cpu"])
    job = PackJob(spec, (), BasePaths.from_spec(spec), "a-run", None)
    with pytest.raises(ServiceError, match="Ray broke while it trained a-run: "):
        _fit(job, str(tmp_path))


AWAY = OSError("When listing objects under key 'a': AWS Error NETWORK_CONNECTION: Empty reply")


def test_what_s3_breaks_for_ray_is_no_concepts_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(_: Any) -> None:
        raise ControllerError(AWAY)

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    spec = resolve_spec("pocket", None, ["train.device=cpu"])
    job = PackJob(spec, (), BasePaths.from_spec(spec), "a-run", None)
    with pytest.raises(ServiceError, match="was away for a while: .*Empty reply"):
        _fit(job, str(tmp_path))
    away = pytest.raises(ServiceError, match="was away for a while: .*Empty reply")
    with away, _reading(str(tmp_path)):
        raise AWAY
    monkeypatch.setattr("components.train.pack.check_storage", lambda _: None)
    with pytest.raises(AwayError, match="was away"):  # however often that happens
        _fit(job, "s3://runs")
    denied = pytest.raises(ServiceError, match="ACCESS_DENIED")
    with denied as caught, _reading("s3://runs"):
        raise OSError("When uploading part: AWS Error ACCESS_DENIED during PutObject operation")
    own = pytest.raises(ServiceError, match="s3://runs: .*Permission denied")
    with own as local, _reading("s3://runs"):
        raise PermissionError(errno.EACCES, "Permission denied", "/cache/runs")
    for each in (caught, local):
        assert not isinstance(each.value, AwayError), "it would be waited for for ever"
    with pytest.raises(ServiceError, match="no space left"), _reading(str(tmp_path)):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_breaks_in_training_is_the_concepts_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(_: Any) -> None:
        raise ControllerError(ValueError("of its own"))

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    spec = resolve_spec("pocket", None, ["train.device=cpu"])
    job = PackJob(spec, (), BasePaths.from_spec(spec), "a-run", None)
    assert "used up its restarts" in _fit(job, str(tmp_path))
