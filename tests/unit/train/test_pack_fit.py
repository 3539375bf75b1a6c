"""What the caller of Ray Train makes of its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError

from components.spec import resolve_spec
from components.train.job import BasePaths, PackJob
from components.train.pack import _fit
from model.errors import ServiceError


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


def test_what_breaks_in_training_is_the_concepts_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(_: Any) -> None:
        raise ControllerError(ValueError("of its own"))

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    spec = resolve_spec("pocket", None, ["train.device=cpu"])
    job = PackJob(spec, (), BasePaths.from_spec(spec), "a-run", None)
    assert "used up its restarts" in _fit(job, str(tmp_path))
