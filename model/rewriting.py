"""Parts of the frozen networks put in other words: the same functions, in fewer passes.

What is written for any network costs more than it must where weights never change, pictures lie
channels last, and torch compiles what stands together. Results differ by round-off alone.
"""

from types import MethodType
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from model.compiling import table
from model.iteration import Frozen


def rewrite(frozen: Frozen) -> None:
    """Rewrite the UNets and the VAE in place; what is rewritten already stays so."""
    pair = frozen.pair
    for network in (pair.teacher, pair.student, pair.vae):
        _replace_layers(network)
        for layer in network.modules():
            # Methods, so that a copy of the layer calls them with itself.
            if isinstance(layer, nn.GroupNorm):
                layer.forward = MethodType(_group_norm, layer)  # type: ignore[method-assign]
            elif _is_plain_block(layer):
                layer.forward = MethodType(_residual_block, layer)  # type: ignore[method-assign]
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


class SplitGEGLU(nn.Module):
    """A product gated by another: two layers, whose gradients need not be put together."""

    def __init__(self, joined: GEGLU) -> None:
        """Take the two out of diffusers' one; their weights stay where they are."""
        super().__init__()
        weights, biases = joined.proj.weight.chunk(2), joined.proj.bias.chunk(2)
        self.value, self.gate = map(_linear, weights, biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [..., w] of [..., c]."""
        return self.value(x) * F.gelu(self.gate(x))


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _replace_layers(network: nn.Module) -> None:
    for block in list(network.modules()):
        for name, layer in list(block.named_children()):
            if isinstance(layer, Upsample2D) and _is_plain(layer):
                setattr(block, name, MergedUpsampling(layer.conv))
            elif isinstance(layer, GEGLU) and layer.proj.bias is not None:
                setattr(block, name, SplitGEGLU(layer))


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
    # Sums of distances from one of the pixels: a pass that runs at the speed of the memory. Which
    # pixel makes no difference to the result, so none to its gradient.
    pixel = x[:, :, :1, :1].detach().float()
    apart = x.float() - pixel
    first, second = apart.mean(dim=(2, 3)), apart.square().mean(dim=(2, 3))  # [R, C] each
    spread, mean = (second - first.square()).clamp_min(0), first + pixel[:, :, 0, 0]
    spread, mean = table(torch.stack([spread, mean])).unbind(0)
    means = mean.unflatten(1, (self.num_groups, -1))
    centre = means.mean(dim=2, keepdim=True)
    within = spread.unflatten(1, (self.num_groups, -1)).mean(dim=2, keepdim=True)
    variance = within + (means - centre).square().mean(dim=2, keepdim=True)
    scale = (variance + self.eps).rsqrt().expand_as(means).flatten(1) * self.weight.float()
    shift = self.bias.float() - centre.expand_as(means).flatten(1) * scale
    scale, shift = table(torch.stack([scale, shift])).unbind(0)
    return (x.float() * scale[..., None, None] + shift[..., None, None]).to(x.dtype)


def _residual_block(
    self: ResnetBlock2D, input_tensor: torch.Tensor, temb: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute a plain block: [R, c, H, W] of [R, C, H, W] and time [R, T].

    Without the division by a scale of 1, which is a pass of its own on the way back.
    """
    x = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
    if self.time_emb_proj is not None:
        x = x + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
    x = self.conv2(self.nonlinearity(self.norm2(x)))
    return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + x


def _is_plain_block(block: nn.Module) -> bool:
    return isinstance(block, ResnetBlock2D) and (
        block.upsample is block.downsample is None
        # Any other name means the same to a block that sees no time (the decoder's say "group").
        and (block.time_embedding_norm == "default" or block.time_emb_proj is None)
        and not block.skip_time_act
        and block.dropout.p == 0
        and block.output_scale_factor == 1
    )
