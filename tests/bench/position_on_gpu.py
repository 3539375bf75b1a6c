"""Which layers give a row of a batch another value at another place, and which settings stop that.

The endpoint promises a picture that is the same to the last bit within one padded size, whatever
it was drawn with. Here every layer of the text encoder, the student and the VAE gets its own inputs
twice, once with the rows in reverse order, and what differs is counted by kind of layer. README.md
("On a GPU without an installation") says what it needs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.bench_measure import find_device
from pipeline.bench_serve_parts import prompt, served_base
from serve.engine import Engine, PictureRequest
from serve.fast import convolutions, quicken

LAYERS = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)
ATTENTION = "attention"


def settings(pair: Any) -> dict[str, Callable[[], Any]]:
    """What is tried, each on top of those before it."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn

    def whole_sums() -> None:
        cuda.matmul.allow_fp16_reduced_precision_reduction = False
        cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def deterministic() -> None:
        cudnn.deterministic = True

    found: dict[str, Callable[[], Any]] = {
        "as it is": lambda: None,
        "no reduced sums": whole_sums,
        "deterministic cuDNN": deterministic,
    }
    if torch.cuda.is_available():
        for library in ("cublas", "cublaslt"):
            found[library] = partial(cuda.preferred_blas_library, library)

    def channels_last() -> None:
        for network in (pair.student, pair.vae):
            network.to(memory_format=torch.channels_last)

    found["channels last"] = channels_last
    # The last one is what the endpoint does; on a CPU it changes nothing more.
    found["steady"] = lambda: quicken(pair, "eager", channels_last=True)
    return found


def differs(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> bool:
    """Tell whether the rows' results depend on the rows' places."""
    there = function(*inputs)
    # Laid out as they were: another layout is another kernel.
    reverse = [torch.empty_like(each).copy_(each.flip(0)) for each in inputs]
    turned = function(*reverse).flip(0)
    return not torch.equal(there, turned)


@contextmanager
def watched(
    networks: list[nn.Module], count: Counter[str], off: Counter[str], places: Counter[str]
) -> Iterator[None]:
    """Try every layer that runs in the block in both orders."""
    plain_attention = F.scaled_dot_product_attention

    def look(layer: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        kind = type(layer).__name__
        count[kind] += 1
        if differs(layer.forward, inputs[0]):
            off[kind] += 1
            weight = "x".join(map(str, layer.weight.shape))
            places[f"{kind} {weight} of {'x'.join(map(str, inputs[0].shape))}"] += 1

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
        count[ATTENTION] += 1
        if differs(lambda *qkv: plain_attention(*qkv, **more), q, k, v):
            off[ATTENTION] += 1
            places[f"{ATTENTION} of {'x'.join(map(str, q.shape))}"] += 1
        return plain_attention(q, k, v, **more)

    layers = [m for network in networks for m in network.modules() if isinstance(m, LAYERS)]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    # torch's own is a builtin, whose type no function of ours has; it is put back below.
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain_attention  # type: ignore[assignment]
        for hook in hooks:
            hook.remove()


def main() -> int:
    """Print a row a setting; exit code 1 when none makes rows independent of their places."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="sd-turbo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--settings", type=int, help="only the first so many")
    arguments = parser.parse_args()
    pair = served_base(
        arguments.base, getattr(torch, arguments.dtype), find_device(arguments.device)
    ).pair
    held = False
    for name, change in list(settings(pair).items())[: arguments.settings]:
        change()
        for size in map(int, arguments.batches.split(",")):
            requests = [PictureRequest(prompt(i), i) for i in range(size)]
            engine = Engine(pair, batch_sizes=[size])
            count, off, places = Counter[str](), Counter[str](), Counter[str]()
            same = bool((engine.draw(requests) == engine.draw(requests[::-1])[::-1]).all())
            held |= same
            engine = Engine(pair, batch_sizes=[size])  # which knows no prompt yet
            with watched([pair.text_encoder, pair.student, pair.vae], count, off, places):
                engine.draw(requests)
            found = ", ".join(f"{kind} {off[kind]} of {count[kind]}" for kind in sorted(count))
            print(f"{name}, batch {size}: pictures {'same' if same else 'DIFFER'}; {found}")
            if ways := convolutions(pair):
                print(f"    convolutions by way, of all shapes so far: {ways}")
            for place, times in places.most_common(12):
                print(f"    {times} x {place}", flush=True)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
