"""ZeRO stage 3 for the frozen networks: every rank keeps its part of each weight.

Nothing of them is trained, so each is an engine of its own without an optimizer: DeepSpeed's hooks
gather a layer's weights from all ranks when it is used, forward and backward, and drop them again.
Ranks must run the same passes in the same order meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from components.train import ranks
from model.iteration import Frozen

# Biases and norms stay whole: gathering one takes longer than it saves.
SMALL = 10_000
# Weights of a network that are whole at once: the layers in use, and the next ones on their way.
WHOLE_AT_ONCE = 100_000_000
AHEAD = 20_000_000
# Gathered as wholes: DeepSpeed's hooks around each layer inside take longer than its work.
BLOCKS = (
    "ResnetBlock2D",
    "BasicTransformerBlock",
    "ViTLayer",
    "Dinov2Layer",
    "CLIPEncoderLayer",
)


class Shards:
    """The networks that are kept in parts; none, where all are whole."""

    def __init__(self, networks: Sequence[nn.Module] = ()) -> None:
        """Cut networks into parts, in place."""
        # DeepSpeed sends and cuts weights as they lie in memory, and takes no other layout than
        # torch's own: channels last is put aside until the networks are whole again.
        weights = (weight for network in networks for weight in network.parameters())
        self._channels_last = [weight for weight in weights if weight.stride()[-1:] > (1,)]
        for weight in self._channels_last:
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        self._engines = [_engine(network) for network in networks]

    def tidy(self) -> None:
        """Drop what a backward pass gathered and did not drop: call it after each.

        DeepSpeed drops a layer's weights when gradient has reached its input. The first layers'
        inputs need none, and of layers that ran twice it counts the last run only.
        """
        for engine in self._engines:
            engine.optimizer.release_backward_leftovers()

    def join(self) -> None:
        """Make the networks whole again."""
        for engine in self._engines:
            engine.destroy()
            for parameter in engine.module.parameters():
                parameter.all_gather()
        for weight in self._channels_last:
            weight.data = weight.data.clone(memory_format=torch.channels_last)
        self._engines, self._channels_last = [], []


@contextmanager
def sharded(frozen: Frozen, stage: int | str) -> Iterator[Shards]:
    """Keep a part of the frozen networks on each rank while the block runs, at stage 3.

    They are whole again after it, but for an error: the other ranks may be anywhere then. With one
    rank, or at another stage, they are whole all the time.

    Args:
        frozen: the networks, which are changed in place.
        stage: of ZeRO.
    """
    shards = Shards(networks(frozen) if stage == 3 and ranks.world_size() > 1 else ())
    yield shards
    shards.join()


def networks(frozen: Frozen) -> list[nn.Module]:
    """Give the frozen networks, each once."""
    pair = frozen.pair
    backbones = [each.network for each in (*frozen.backbones, frozen.identity)]
    found = [pair.teacher, pair.student, pair.vae, pair.text_encoder, *backbones]
    return list({id(network): network for network in found}.values())


def _engine(network: nn.Module) -> Any:
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(network, list(BLOCKS), raise_if_not_found=False)
    half = next(network.parameters()).dtype == torch.bfloat16
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "bf16": {"enabled": half},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": SMALL,
            "stage3_max_live_parameters": WHOLE_AT_ONCE,
            "stage3_max_reuse_distance": WHOLE_AT_ONCE,
            "stage3_prefetch_bucket_size": AHEAD,
        },
    }
    engine = deepspeed.initialize(model=network, config=config)[0]
    _keep_what_is_recomputed(engine.optimizer.get_param_coordinator())
    return engine


def _keep_what_is_recomputed(coordinator: Any) -> None:
    """Keep weights whole from a checkpointed block's second forward pass to their own backward.

    DeepSpeed would drop those of the very layer whose backward asked for the pass, and that layer
    then finds nothing.
    """
    release = coordinator.release_sub_module

    def release_unless_recomputed(layer: nn.Module, forward: bool = False) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        if not (forward and in_backward):
            release(layer, forward=forward)

    coordinator.release_sub_module = release_unless_recomputed
