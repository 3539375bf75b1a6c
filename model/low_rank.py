"""Low rank: the deltas of K/V matrices as products of thin matrices.

A layer's delta `D` [c, d] is stored whole as `<path>.to_k.weight`, or as `B @ A` of rank r: `A`
[r, d] as `<path>.to_k.lora_A.weight` and `B` [c, r] as `<path>.to_k.lora_B.weight` (the names of
peft and diffusers). `B @ A` is the truncated SVD of `D`, the nearest matrix of its rank
(Eckart and Young, 1936), with the singular values shared evenly between the two.

Every layer has the same rank, or its smaller side where that is less: one number says it, every
loader takes it, and looking for the smallest one that is good enough has one dimension.

At the size of Stable Diffusion 2.1 (16 cross-attention layers of width 320 to 1280, text width
1024: C = 24 960 rows in 32 matrices) a whole delta has 25.6 million numbers, 51.1 MB at fp16;
rank r has r * (24 960 + 32 * 1024) = 57 728 r, which is 0.9 MB at rank 8, 1.8 MB at 16 and 3.7 MB
at 32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from model.errors import InputError

WHOLE, DOWN, UP = ".weight", ".lora_A.weight", ".lora_B.weight"
Parts = Mapping[str, torch.Tensor]
"""Deltas as they are stored, by name: whole matrices, or pairs of factors."""


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The singular value decompositions of some deltas, from which any rank is read.

    Attributes:
        factors: by layer name (`<path>.to_k`), `U` [c, m], `s` [m] and `V^T` [m, d], float32,
            where the deltas are.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, deltas: Parts) -> "Decomposition":
        """Decompose whole deltas by name (see `whole`), on their device."""
        factors = {}
        for name, delta in deltas.items():
            u, s, vh = torch.linalg.svd(delta.float(), full_matrices=False)
            factors[name.removesuffix(WHOLE)] = (u, s, vh)
        return cls(factors)

    @property
    def full_rank(self) -> int:
        """Give the rank that loses nothing in any layer."""
        return max(len(s) for _, s, _ in self.factors.values())

    def numbers(self, rank: int) -> int:
        """Count the numbers that are stored at a rank."""
        return sum(
            min(rank, len(s)) * (u.shape[0] + vh.shape[1]) for u, s, vh in self.factors.values()
        )

    def at_rank(self, rank: int) -> dict[str, torch.Tensor]:
        """Give the factors of the nearest deltas of a rank, float16, by stored name."""
        parts = {}
        for name, (u, s, vh) in self.factors.items():
            root = s[:rank].sqrt()
            parts[name + DOWN] = (root[:, None] * vh[:rank]).half().contiguous()
            parts[name + UP] = (u[:, :rank] * root).half().contiguous()
        return parts


def whole(parts: Parts) -> dict[str, torch.Tensor]:
    """Give whole deltas by `<path>.to_k.weight`, however they are stored.

    Returns:
        [c, d] each, on the device of the parts; float32 where there are factors, else as stored.

    Raises:
        InputError: when a factor is without its other one or does not fit it, or when a layer is
            stored in both ways.
    """
    deltas: dict[str, torch.Tensor] = {}
    for layer in dict.fromkeys(name.removesuffix(DOWN).removesuffix(UP) for name in parts):
        down, up = parts.get(layer + DOWN), parts.get(layer + UP)
        if down is None and up is None:
            deltas[layer] = parts[layer]
        elif down is None or up is None or layer + WHOLE in parts or len(down) != up.shape[1]:
            raise InputError(
                f"The factors of {layer!r} do not fit each other; fetch the adapter again."
            )
        else:
            deltas[layer + WHOLE] = up.float() @ down.float()
    return deltas


def weight_error(reference: Parts, parts: Parts) -> float:
    """Measure `||D' - D|| / ||D||` (Frobenius, over all layers); 0 when `D` is 0 everywhere."""
    exact, near = whole(reference), whole(parts)
    off = sum(float((near[name].double() - d.double()).square().sum()) for name, d in exact.items())
    size = sum(float(d.double().square().sum()) for d in exact.values())
    return (off / size) ** 0.5 if size else 0.0
