"""Keyed randomness: every draw of the method comes from (seed, concept, iteration, purpose, item).

Draws are made on the CPU in float32, so that CPU and GPU, one rank and many, alone and in a pack
see the same numbers (METHOD.md "Packing", point 2).
"""

import hashlib
import json
from collections.abc import Sequence

import torch


def generator(
    seed: int, concept_id: str, iteration: int, purpose: str, item: int = 0
) -> torch.Generator:
    """Give the CPU generator of one draw, seeded with sha256 of the key.

    Args:
        seed: the run's seed.
        concept_id: the concept that the draw belongs to; never its place in a pack.
        iteration: iteration number, counted over all stages.
        purpose: what is drawn, e.g. `"noise"`; different purposes are independent.
        item: index in the global batch of the concept; never a rank's.
    """
    key = json.dumps([seed, concept_id, iteration, purpose, item]).encode()
    value = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
    return torch.Generator(device="cpu").manual_seed(value)


def normal(shape: Sequence[int], gen: torch.Generator) -> torch.Tensor:
    """Draw standard normal float32 values of `shape` on the CPU."""
    return torch.randn(tuple(shape), generator=gen, dtype=torch.float32)


def uniform(gen: torch.Generator) -> float:
    """Draw one number from [0, 1)."""
    return float(torch.rand((), generator=gen, dtype=torch.float64))


def integer(low: int, high: int, gen: torch.Generator) -> int:
    """Draw one whole number from low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=gen))
