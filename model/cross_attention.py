"""Cross-attention keys and values, computed outside the UNet.

All `attn2.to_k` and `attn2.to_v` matrices of a UNet are handled as ONE matrix `W` [C, d_text].
`kv = text_states @ W.T`, cut into the layers' columns, goes into the UNet as
`encoder_hidden_states`, and every cross-attention layer reads its own pieces. So the UNet is a
frozen pure function, what is trained are two plain tensors, and one batch may mix concepts freely.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Transformer2DModel
from torch import nn
from torch.nn import functional as F

from model.errors import InputError
from model.kv_layout import KVLayout
from model.packing import grouped_linear


class ReadKeysValues:
    """Attention processor that takes keys and values from the transformer's pieces.

    Otherwise it is diffusers' scaled dot product attention.
    """

    def __init__(self, place: int) -> None:
        """Remember the place of the layer's keys among them; its values follow."""
        self.place = place

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Sequence[torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        **_unused: Any,
    ) -> torch.Tensor:
        """Attend from `hidden_states` [R, P, c] over the layer's keys and values [R, L, c]."""
        assert encoder_hidden_states is not None, "cross-attention needs keys and values"
        query = self._heads(attn.to_q(hidden_states), attn.heads)
        key = self._heads(encoder_hidden_states[self.place], attn.heads)
        value = self._heads(encoder_hidden_states[self.place + 1], attn.heads)
        out = F.scaled_dot_product_attention(query, key, value)
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor

    @staticmethod
    def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class _OwnPieces:
    """Hook that gives a transformer its own of the UNet's pieces.

    So no block inside knows its place in the UNet, and all of one shape can be compiled as one.
    """

    def __init__(self, pieces: slice) -> None:
        self.pieces = pieces

    def __call__(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kv = kwargs.get("encoder_hidden_states")
        if isinstance(kv, tuple):  # a copy of the UNet may be given text states again
            kwargs = kwargs | {"encoder_hidden_states": kv[self.pieces]}
        return args, kwargs


def expose_keys_values(unet: nn.Module) -> KVLayout:
    """Make a UNet read keys and values from outside; idempotent.

    Afterwards `unet(z, t, encoder_hidden_states=layout.cut(kv))` takes kv [R, L, C] in place of
    text states.

    Raises:
        InputError: for a UNet whose cross-attention is not of the Stable Diffusion 1/2 kind.
    """
    names: list[str] = []
    slices: list[slice] = []
    start = 0
    for transformer, layers in _cross_attention(unet):
        first = len(slices)
        for path, attn in layers.items():
            for part in ("to_k", "to_v"):
                end = start + getattr(attn, part).weight.shape[0]
                names.append(f"{path}.{part}.weight")
                slices.append(slice(start, end))
                start = end
        if not any(isinstance(attn.processor, ReadKeysValues) for attn in layers.values()):
            own = _OwnPieces(slice(first, len(slices)))
            transformer.register_forward_pre_hook(own, with_kwargs=True)
        for place, attn in enumerate(layers.values()):
            attn.processor = ReadKeysValues(2 * place)
    return KVLayout(tuple(names), tuple(slices), start)


def base_weight(unet: nn.Module, layout: KVLayout) -> torch.Tensor:
    """Copy the UNet's own K/V matrices: [C, d_text] float32."""
    parameters = dict(unet.named_parameters())
    return torch.cat([parameters[name].detach().float() for name in layout.names])


def keys_values(
    text_states: torch.Tensor, weight: torch.Tensor, concept: torch.Tensor
) -> torch.Tensor:
    """Compute every layer's keys and values: `kv[r] = text_states[r] @ weight[concept[r]].T`.

    Args:
        text_states: [R, L, d]; its type is the type of the product.
        weight: [N, C, d] float32 masters, cast to the type of `text_states`.
        concept: [R] long, on the CPU.

    Returns:
        [R, L, C].
    """
    return grouped_linear(text_states, weight.to(text_states.dtype), concept)


def _cross_attention(unet: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Find the transformers, each with its cross-attention layers by module path, in order."""
    layers = {
        name: module for name, module in unet.named_modules() if name.split(".")[-1] == "attn2"
    }
    transformers = [
        (module, {name: attn for name, attn in layers.items() if name.startswith(f"{path}.")})
        for path, module in unet.named_modules()
        if isinstance(module, Transformer2DModel)
    ]
    inside = [name for _, own in transformers for name in own]
    config: Any = unet.config
    extra = [
        key
        for key in ("encoder_hid_dim_type", "addition_embed_type", "encoder_hid_dim")
        if config.get(key) is not None
    ]
    odd = [key for key in ("only_cross_attention", "dual_cross_attention") if config.get(key)]
    known = layers and inside == list(layers) and all(map(_plain, layers.values()))
    if extra or odd or not known:
        raise InputError(
            f"{type(unet).__name__}: its cross-attention is not of the Stable Diffusion 1/2 kind "
            f"({', '.join(extra + odd) or 'no plain attn2 layers'}); use such a UNet."
        )
    return transformers


def _plain(attn: Any) -> bool:
    """Tell whether a layer is Linear K/V with nothing between them and the attention."""
    return (
        isinstance(getattr(attn, "to_k", None), nn.Linear)
        and attn.to_k.bias is None
        and attn.to_v.bias is None
        and not any(
            getattr(attn, part, None) is not None
            for part in ("add_k_proj", "norm_cross", "norm_q", "norm_k", "group_norm")
        )
        and getattr(attn, "spatial_norm", None) is None
        and not attn.residual_connection
    )
