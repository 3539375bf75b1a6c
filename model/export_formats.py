"""An adapter's tensors as other programs name them.

LoRA files hold the factors of `low_rank.py`: plain diffusers reads peft's names below `unet.`,
kohya's sd-scripts (and all that reads its files, ComfyUI and diffusers among them) the module path
with underscores, `lora_down`, `lora_up` and an `alpha`, by whose ratio to the rank they scale.
Token rows are textual-inversion embeddings, a file each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.adapter import Adapter
from model.low_rank import DOWN, UP, Parts

Tensors = dict[str, torch.Tensor]
_SD2_WIDTH = 1024  # of the text encoder's states; Stable Diffusion 1 has 768


@dataclass(frozen=True)
class Format:
    """How one program wants an adapter.

    Attributes:
        low_rank: whether it takes factors; else whole matrices.
        weights: path of the weights file, `{id}` being the concept's.
        embedding: path of an embedding file; `{n}` is empty for the first token, then `-2`, ...
        tensors: from factors, or whole matrices, by name to the tensors of the weights file.
        key: from a token's string and width to the embedding's name in its file.
    """

    low_rank: bool
    weights: str
    embedding: str
    tensors: Callable[[Parts], Tensors]
    key: Callable[[str, int], str]


def files(kind: Format, adapter: Adapter, weights: Parts) -> dict[str, Tensors]:
    """Give the tensors of an export by the path of their file.

    Args:
        kind: one of `FORMATS`.
        adapter: whose tokens and embeddings go along.
        weights: its factors, or whole matrices by name for a format that is not low-rank.
    """
    concept_id = adapter.meta["concept"]["id"]
    found = {kind.weights.format(id=concept_id): kind.tensors(weights)}
    width = adapter.token_rows.shape[1]
    for path, token, row in zip(
        embedding_paths(kind, adapter), adapter.tokens, adapter.token_rows, strict=True
    ):
        found[path] = {kind.key(token, width): row[None].clone()}
    return found


def embedding_paths(kind: Format, adapter: Adapter) -> list[str]:
    """Give the paths of the embedding files, one a token."""
    concept_id = adapter.meta["concept"]["id"]
    numbers = ["" if n == 1 else f"-{n}" for n in range(1, len(adapter.tokens) + 1)]
    return [kind.embedding.format(id=concept_id, n=number) for number in numbers]


def _diffusers(factors: Parts) -> Tensors:
    return {f"unet.{name}": part for name, part in factors.items()}


def _kohya(factors: Parts) -> Tensors:
    tensors = {}
    # One alpha for all, which diffusers relies on; layers of a lower rank are scaled to fit it.
    alpha = max(len(part) for name, part in factors.items() if name.endswith(DOWN))
    for name, part in factors.items():
        if name.endswith(DOWN):
            module = name.removesuffix(DOWN)
            layer = f"lora_unet_{module.replace('.', '_')}"
            tensors[f"{layer}.lora_down.weight"] = part
            tensors[f"{layer}.lora_up.weight"] = factors[module + UP] * (len(part) / alpha)
            tensors[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _whole(matrices: Parts) -> Tensors:
    return {name: matrix.cpu().contiguous() for name, matrix in matrices.items()}


def _token_itself(token: str, _width: int) -> str:
    return token


def _text_encoder(_token: str, width: int) -> str:
    """ComfyUI asks for its text encoder's name, and takes what it finds under any other."""
    return "clip_h" if width == _SD2_WIDTH else "clip_l"


FORMATS = {
    "diffusers": Format(
        True,
        "pytorch_lora_weights.safetensors",
        "learned_embeds{n}.safetensors",
        _diffusers,
        _token_itself,
    ),
    "kohya": Format(
        True,
        "{id}-lora.safetensors",
        "{id}-embedding{n}.safetensors",
        _kohya,
        lambda _token, _width: "emb_params",
    ),
    "comfyui": Format(
        True,
        "models/loras/{id}.safetensors",
        "models/embeddings/{id}{n}.safetensors",
        _kohya,
        _text_encoder,
    ),
    "full": Format(
        False,
        "unet_kv.safetensors",
        "learned_embeds{n}.safetensors",
        _whole,
        _token_itself,
    ),
}
"""Formats by the name that the command line gives them.

`full` is the student's K/V matrices with the adapter in them, fp16, by the names of a diffusers
UNet's state: `unet.load_state_dict(..., strict=False)` takes them, with no peft and no rank. At
fp16 a sum of base and delta loses some of the delta; the error that is measured says how much.
"""
