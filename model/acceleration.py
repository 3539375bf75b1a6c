"""The frozen networks made faster: rewritten, laid out and compiled.

Nothing of it changes what is computed, only the order of its sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, Literal

import torch
from diffusers import Transformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
from transformers.models.vit.modeling_vit import ViTLayer

from model.compiling import allow_variants
from model.iteration import Frozen
from model.rewriting import MergedUpsampling, NormAndActivation, rewrite

# What the networks are built of, each block with everything inside it. Blocks of one kind and the
# same shapes share their code: a UNet's 38 blocks make 19, a backbone's 24 or 32 make one.
_BLOCKS: tuple[type[nn.Module], ...] = (
    ResnetBlock2D,
    Transformer2DModel,
    NormAndActivation,
    MergedUpsampling,
    Attention,  # the VAE's; a UNet's are inside its transformers
    CLIPEncoderLayer,
    Dinov2Layer,
    ViTLayer,
)
_VARIANTS = 1024
"""How many shapes one kind of block may be compiled for: levels of a UNet, passes, pack sizes."""


def accelerate(frozen: Frozen, channels_last: bool | Literal["auto"], compiled: bool) -> None:
    """Change the networks in place as a run spec asks for.

    `auto` is channels last where blocks are compiled for a GPU: as they are, torch's group norm is
    slower in that layout than the changes of layout that it saves.
    """
    worth = compiled and frozen.pair.device.type == "cuda"
    if compiled:
        rewrite(frozen)
    if worth if channels_last == "auto" else channels_last:
        use_channels_last(frozen)
    if compiled:
        compile_blocks(frozen)


@contextmanager
def uncompiled(compiled: bool) -> Iterator[None]:
    """Run networks as they are while the block runs: for a few passes of a shape of their own.

    Args:
        compiled: whether the networks' blocks are compiled.
    """
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def use_channels_last(frozen: Frozen) -> None:
    """Keep the UNets' and the VAE's pictures with their channels innermost, from end to end.

    The convolutions of a GPU's matrix units want them so, and turn them around and back when they
    are not. The networks are changed in place.
    """
    for network in (frozen.pair.teacher, frozen.pair.student, frozen.pair.vae):
        nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for block in network.modules():
            # diffusers ends a transformer with a copy to channels outermost.
            if isinstance(block, Transformer2DModel) and block.use_linear_projection:
                output = MethodType(_channels_last_output, block)
                block._get_output_for_continuous_inputs = output  # type: ignore[method-assign]


def compile_blocks(frozen: Frozen, backend: str = "inductor") -> None:
    """Have torch compile the blocks of the pair's networks and of the backbones, in place.

    A block is compiled when it first sees a shape, forward and backward: the first iteration of a
    pack size takes minutes on a GPU. What hooks do at a block's borders stays outside.

    Args:
        frozen: the networks.
        backend: of `torch.compile`.
    """
    allow_variants(_VARIANTS)
    pair, backbones = frozen.pair, {*frozen.backbones, frozen.identity}
    networks = [pair.teacher, pair.student, pair.vae, pair.text_encoder]
    networks += [each.network for each in backbones]
    compiled: dict[Any, Any] = {}

    def compile_in(module: nn.Module) -> None:
        for block in module.children():
            if type(block) not in _BLOCKS:
                compile_in(block)
                continue
            # Of a bound method, which torch types as any callable.
            function: Any = block.forward.__func__  # type: ignore[attr-defined]
            if function not in compiled:
                compiled[function] = torch.compile(function, backend=backend, dynamic=False)
            # A method, so that a copy of the block calls it with itself.
            block.forward = MethodType(compiled[function], block)  # type: ignore[method-assign]

    for network in networks:
        compile_in(network)


def _channels_last_output(
    self: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    batch_size: int,
    height: int,
    width: int,
    inner_dim: int,
) -> torch.Tensor:
    """End a transformer as diffusers does, [R, c, h, w], without its copy."""
    rows = self.proj_out(hidden_states).reshape(batch_size, height, width, inner_dim)
    return rows.permute(0, 3, 1, 2) + residual
