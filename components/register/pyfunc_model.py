"""The registered model's code: MLflow copies this file into every version and runs it.

It needs this project installed (``model`` is imported), and the base pair that the adapter was
made for: the pocket pair, or the local directories that adapter.json names. Model config
(``student``, ``teacher``) or the environment (ECHODISTILL_BASE_STUDENT, ECHODISTILL_BASE_TEACHER)
name other places for it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
from mlflow.models import set_model

from model.adapter import load_adapter, prompt_for
from model.base_pair import load_base_pair
from model.errors import InputError
from model.png import png
from model.sampler import draw
from model.text import check_length

POCKET = "pocket"


class EchoDistillModel(mlflow.pyfunc.PythonModel):
    """Draws with one adapter: columns prompt, seed (0), steps (1) -> column image (PNG bytes)."""

    def load_context(self, context: Any) -> None:
        """Load adapter and base pair, both verified."""
        config = context.model_config or {}
        self.adapter = load_adapter(
            context.artifacts["adapter"], expected_sha256=config.get("adapter_sha256")
        )
        base = self.adapter.meta["base"]
        student = _directory("student", config, base)
        # Drawing needs no teacher: without one, the student stands in for it.
        self.pair = load_base_pair(
            _named("teacher", config) or student,
            student,
            name=base["name"],
            device=config.get("device") or "cpu",
            resolution=self.adapter.meta["resolution"],
        )
        self.adapter.check_base(self.pair)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Draw one picture a row; the same seed gives the endpoint's picture."""
        images = []
        for row in model_input.to_dict("records"):
            prompt = prompt_for(self.adapter.meta, str(row["prompt"]))
            check_length(self.pair.tokenizer, prompt, self.adapter.tokens)
            seed, steps = _whole(row, "seed", 0), _whole(row, "steps", 1)
            picture = draw(self.pair, [self.adapter], [prompt], [seed], steps)[0]
            images.append(png(picture.permute(1, 2, 0).numpy()))
        return pd.DataFrame({"image": images})


def _whole(row: dict[str, Any], name: str, default: int) -> int:
    value = row.get(name)
    return default if value is None or pd.isna(value) else int(value)


def _named(part: str, config: dict[str, Any]) -> str:
    return config.get(part) or os.environ.get(f"ECHODISTILL_BASE_{part.upper()}", "")


def _directory(part: str, config: dict[str, Any], base: dict[str, Any]) -> Path:
    """Return a part of the base pair: as configured, the pocket pair's, or as recorded."""
    named = _named(part, config)
    if named:
        return Path(named)
    recorded = str(base.get(part) or "")
    # The place that the pocket pair was unpacked to is a matter of each machine.
    if recorded.startswith(f"{POCKET}:") or base["name"] == POCKET:
        from model.pocket import pocket_paths

        return Path(getattr(pocket_paths(), part))
    if not Path(recorded).is_dir():
        raise InputError(
            f"the base {base['name']!r} ({recorded or 'no place recorded'}) is not on this "
            f"machine: set ECHODISTILL_BASE_{part.upper()} to its directory"
        )
    return Path(recorded)


set_model(EchoDistillModel())
