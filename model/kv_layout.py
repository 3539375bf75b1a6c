"""Where each layer's keys and values lie in the one matrix that stands for all of them.

Apart from the networks, so that who only reads adapters need not wait for their libraries.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from model.errors import InputError


@dataclass(frozen=True)
class KVLayout:
    """Which rows of `W` belong to which layer.

    Attributes:
        names: `<module path>.to_k.weight` and `.to_v.weight`, in the order of the rows.
        slices: the rows of each name.
        width: C, the number of all rows.
    """

    names: tuple[str, ...]
    slices: tuple[slice, ...]
    width: int

    def cut(self, kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut keys and values [R, L, C] into what the UNet takes: views [R, L, c], one a name.

        One cut for all layers: on the way back their gradients are put together once. A slice in
        every layer would make a whole [R, L, C] of zeros each and add them all up.
        """
        return kv.split([rows.stop - rows.start for rows in self.slices], dim=-1)


def split(layout: KVLayout, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cut `W` [C, d] into the layers' matrices by name (views)."""
    return {name: weight[rows] for name, rows in zip(layout.names, layout.slices, strict=True)}


def join(layout: KVLayout, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Put the layers' matrices together to `W` [C, d]; inverse of `split`.

    Raises:
        InputError: when a layer is missing, unknown or of another size.
    """
    unknown = sorted(set(parts) - set(layout.names))
    if unknown:
        raise InputError(f"Layer {unknown[0]!r} is not one of this base's; use the adapter's base.")
    for name, rows in zip(layout.names, layout.slices, strict=True):
        if name not in parts or parts[name].shape[0] != rows.stop - rows.start:
            raise InputError(
                f"Layer {name!r} is missing or of another size; use the adapter's own base."
            )
    return torch.cat([parts[name] for name in layout.names])
