"""What every training stage shares: mixed precision, EMA, CUDA graphs, time budget, state on disk.

A stage is a number of steps. It runs until its steps are done or the time given is used up, writes
its state (safetensors and JSON, by atomic rename), and goes on from there when it is started again.
Before every step the stage's generator is seeded by stage and step, so that on the CPU in float32 a
stopped and resumed stage ends with the very numbers of an undisturbed one. On a GPU it ends alike,
not equal: the warm-up of its CUDA graphs moves Adam's moments a little at every start, and its
kernels do not add in a fixed order.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SAVE_SECONDS = 60.0  # a killed stage loses at most this much


class Trainee:
    """A network in training: working copy in `dtype`, float32 masters with AdamW, and their EMA.

    The working copy is what losses go through; `step` takes its gradients to the masters and
    copies the result back. No value is read back to the CPU, so a step can be a CUDA graph.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        ema: float = 0.999,
        clip: float = 1.0,
        learns: str = "",
    ) -> None:
        """Take a copy of `network`, of which the parameters learn whose names begin so."""
        self.net: Any = copy.deepcopy(network).to(device, dtype).train().requires_grad_(False)
        named = [(n, p) for n, p in self.net.named_parameters() if n.startswith(learns)]
        for _, param in named:
            param.requires_grad_(True)
        self.names = [n for n, _ in named]
        self.params: list[Tensor] = [p for _, p in named]
        start = dict(network.named_parameters())
        self.masters = [start[n].detach().to(device).float().clone() for n in self.names]
        self.average = [w.clone() for w in self.masters]
        self.lr = torch.zeros((), device=device)
        self.ema, self.clip = ema, clip
        matrices = [w for w in self.masters if w.ndim > 1]
        vectors = [w for w in self.masters if w.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=self.lr,
            betas=betas,
            fused=True,
            capturable=device.type == "cuda",
        )

    def step(self, loss: Tensor) -> None:
        """One update from `loss` at learning rate `self.lr`."""
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        full = [
            torch.zeros_like(w) if g is None else g.float().contiguous()
            for g, w in zip(grads, self.masters, strict=True)
        ]
        norm = torch.stack(torch._foreach_norm(full)).norm()
        torch._foreach_mul_(full, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        for master, grad in zip(self.masters, full, strict=True):
            master.grad = grad
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
            torch._foreach_lerp_(self.average, self.masters, 1 - self.ema)

    def averaged(self) -> Any:
        """A float32 network with the averaged weights, frozen."""
        net = copy.deepcopy(self.net).float().eval().requires_grad_(False)
        with torch.no_grad():
            own = dict(net.named_parameters())
            torch._foreach_copy_([own[name] for name in self.names], self.average)
        return net

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on."""
        out: dict[str, Tensor] = {}
        for name, master, average in zip(self.names, self.masters, self.average, strict=True):
            kept = self.optimizer.state.get(master, {})
            out |= {f"master.{name}": master, f"average.{name}": average}
            out |= {f"{key}.{name}": value for key, value in kept.items()}
        return out

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """The reverse of `state`; values are copied in place, where a CUDA graph may hold them."""
        for name, master, average, param in zip(
            self.names, self.masters, self.average, self.params, strict=True
        ):
            master.copy_(state[f"master.{name}"])
            average.copy_(state[f"average.{name}"])
            param.copy_(master)
            kept = self.optimizer.state[master]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = state.get(f"{key}.{name}")
                if value is not None and key in kept:
                    kept[key].copy_(value)
                elif value is not None:
                    kept[key] = value.to(master.device)


def graphed(step: Callable[[], Tensor], gen: torch.Generator) -> Callable[[], Tensor]:
    """`step` as a CUDA graph (on the CPU: as it is), after four plain runs.

    `gen` is the generator that the step draws from; the returned tensor is overwritten each call.
    """
    if gen.device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(gen)
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@dataclass
class Clock:
    """Time that this call of a command may use."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds left, negative when the time is over."""
        return self.seconds - (time.monotonic() - self.start)


class OutOfTime(Exception):
    """The time of this call is used up; the state is on disk, start again to go on."""


def cosine(step: int, total: int, peak: float, warm: int = 200, floor: float = 0.02) -> float:
    """Learning rate: linear warm-up, then half a cosine from `peak` to `floor * peak`."""
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))) * (1 - floor) + floor
    return peak * min(1.0, (step + 1) / warm) * falling


class Stage:
    """One stage's state in `folder`: `<name>.safetensors`, and its log as `<name>.json`."""

    def __init__(self, name: str, folder: Path, total: int, clock: Clock) -> None:
        self.name, self.folder, self.total, self.clock = name, folder, total, clock
        self.path = folder / f"{name}.safetensors"
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        if self.path.exists():
            with safe_open(self.path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
            self.step, self.seconds, self.log = facts["step"], facts["seconds"], facts["log"]

    @property
    def done(self) -> bool:
        """True when all steps are made."""
        return self.step >= self.total

    def seed(self, step: int) -> int:
        """Seed of the random numbers of one step."""
        digest = hashlib.sha256(f"{self.name}/{step}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def resume(self, trainees: dict[str, Trainee]) -> None:
        """Load the trainees where an earlier call left them."""
        if self.step:
            tensors = load_file(self.path)
            for key, trainee in trainees.items():
                trainee.load(
                    {
                        k.removeprefix(f"{key}/"): v
                        for k, v in tensors.items()
                        if k.startswith(f"{key}/")
                    }
                )

    def save(self, trainees: dict[str, Trainee]) -> None:
        """Write the state; tensors and step are one file, so a kill never parts them."""
        tensors = {
            f"{key}/{name}": value
            for key, trainee in trainees.items()
            for name, value in trainee.state().items()
        }
        facts = {"step": self.step, "seconds": round(self.seconds, 1), "log": self.log}
        write_tensors(self.path, tensors, {"facts": json.dumps(facts)})
        write_text(self.folder / f"{self.name}.json", json.dumps(facts))

    def run(
        self,
        trainees: dict[str, Trainee],
        step: Callable[[int], dict[str, Tensor]],
        gen: torch.Generator,
        every: int = 250,
    ) -> None:
        """Call `step(i)` for the steps that are left.

        Args:
            trainees: what is saved.
            step: makes step i and returns tensors to log.
            gen: the generator that the steps draw from; seeded anew before each.
            every: steps between two lines of the log.

        Raises:
            OutOfTime: before the last step, with the state saved.
        """
        start, before, saved = time.monotonic(), self.seconds, time.monotonic()
        while not self.done:
            if self.clock.left() < 0:
                self.save(trainees)
                raise OutOfTime(f"{self.name}: {self.step} of {self.total} steps")
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save(trainees)
                saved = time.monotonic()
            gen.manual_seed(self.seed(self.step))
            logged = step(self.step)
            self.step += 1
            self.seconds = before + time.monotonic() - start
            if self.step % every == 0 or self.done:
                values = {k: round(float(v.detach()), 4) for k, v in logged.items()}
                self.log.append({"step": self.step, "s": round(self.seconds, 1), **values})
                print(self.name, json.dumps(self.log[-1]), flush=True)
        self.save(trainees)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write safetensors by atomic rename."""
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Write text by atomic rename."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)


def freeze(module: nn.Module) -> Any:
    """Evaluation mode, no gradients."""
    return module.eval().requires_grad_(False)


def mean(values: Iterable[Tensor]) -> Tensor:
    """Mean of several scalars."""
    return torch.stack(list(values)).mean()
