"""Parts of the frozen networks put in other words: the same functions, in fewer passes.

What is written for any network costs more than it must where weights never change, pictures lie
channels last, and torch compiles what stands together. Results differ by round-off alone.
"""

from types import MethodType
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from model.iteration import Frozen


def rewrite(frozen: Frozen) -> None:
    """Rewrite the UNets and the VAE in place; what is rewritten already stays so."""
    pair = frozen.pair
    for network in (pair.teacher, pair.student, pair.vae):
        _merge_upsampling(network)
        for layer in network.modules():
            if isinstance(layer, nn.GroupNorm):
                # A method, so that a copy of the layer calls it with itself.
                layer.forward = MethodType(_group_norm, layer)  # type: ignore[method-assign]
    for network in (pair.teacher, pair.student, pair.vae.encoder, pair.vae.decoder):
        _join_last_activation(network)
    # Its one head is wider than fast attention takes: what torch has for it is slow backward.
    pair.vae.set_attn_processor(AttnProcessor())


class NormAndActivation(nn.Module):
    """A norm and the activation behind it: one block for the compiler."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        """Put the two together."""
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute both: [R, C, H, W]."""
        return self.activation(self.norm(x))


class MergedUpsampling(nn.Module):
    """Nearest upsampling to twice the size and the convolution behind it, in one.

    A pixel of the large picture sees 3x3 pixels of which only 2x2 differ. Those are weighed by the
    sums of the weights that fall together: a transposed convolution of 4x4 and stride 2, with 4
    products for 9, and no large picture in between.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """Merge a convolution of 3x3 with the upsampling before it."""
        super().__init__()
        # Taps 0..3 of the transposed convolution, of the convolution's taps 0..2, in one dimension:
        # outputs 2m and 2m + 1 are w0 x[m-1] + (w1 + w2) x[m] and (w0 + w1) x[m] + w2 x[m+1].
        sums = conv.weight.new_tensor(
            [[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32
        )
        weight = torch.einsum("ak,bl,oikl->ioab", sums, sums, conv.weight.float())
        self.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """Give [R, C, 2H, 2W] of [R, C, H, W]; another size has no merged form."""
        if output_size is not None and tuple(output_size) != (2 * x.shape[2], 2 * x.shape[3]):
            raise ValueError(f"upsampling makes twice {tuple(x.shape[2:])} here, not {output_size}")
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


def _merge_upsampling(network: nn.Module) -> None:
    for block in list(network.modules()):
        for name, layer in list(block.named_children()):
            if isinstance(layer, Upsample2D) and _is_plain(layer):
                setattr(block, name, MergedUpsampling(layer.conv))


def _is_plain(layer: Upsample2D) -> bool:
    conv = layer.conv if layer.use_conv and layer.name == "conv" else None
    plain = isinstance(conv, nn.Conv2d) and (conv.kernel_size, conv.padding) == ((3, 3), (1, 1))
    return plain and layer.norm is None and layer.interpolate


def _join_last_activation(network: Any) -> None:
    norm, activation = network.conv_norm_out, network.conv_act
    if isinstance(norm, nn.GroupNorm):
        network.conv_norm_out = NormAndActivation(norm, activation)
        network.conv_act = nn.Identity()


def _group_norm(self: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """Normalise [R, C, H, W] from its channels' own means and variances.

    Channels last, a group's pixels lie scattered, and torch would turn the picture around for them,
    and back; a channel's numbers are summed row by row. The group's follow from them exactly.
    """
    if x.dim() != 4:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
    spread, mean = torch.var_mean(x.float(), dim=(2, 3), correction=0)  # [R, C]
    means = mean.unflatten(1, (self.num_groups, -1))
    centre = means.mean(dim=2, keepdim=True)
    within = spread.unflatten(1, (self.num_groups, -1)).mean(dim=2, keepdim=True)
    variance = within + (means - centre).square().mean(dim=2, keepdim=True)
    scale = (variance + self.eps).rsqrt().expand_as(means).flatten(1) * self.weight.float()
    shift = self.bias.float() - centre.expand_as(means).flatten(1) * scale
    return (x.float() * scale[..., None, None] + shift[..., None, None]).to(x.dtype)
