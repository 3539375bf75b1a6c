"""What every training stage shares: mixed precision, EMA, CUDA graphs, time budget, state on disk.

A stage is a number of steps. It runs until its steps are done or the time given is used up, writes
its state (safetensors and JSON, by atomic rename), and goes on from there when it is started again.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Trainee:
    """A network in training: working copy in `dtype`, float32 masters with AdamW, and their EMA.

    The working copy is what losses go through; `step` takes its gradients to the masters and
    copies the result back. No value is read back to the CPU, so a step can be a CUDA graph.
    """

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype,
                 betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0,
                 ema: float = 0.999, clip: float = 1.0) -> None:
        self.net = copy.deepcopy(network).to(device, dtype).train().requires_grad_(True)
        named = list(self.net.named_parameters())
        self.names = [n for n, _ in named]
        self.params = [p for _, p in named]
        start = dict(network.named_parameters())
        self.masters = [start[n].detach().to(device).float().clone() for n in self.names]
        self.average = [w.clone() for w in self.masters]
        self.lr = torch.zeros((), device=device)
        self.ema, self.clip, self.started = ema, clip, False
        matrices = [w for w in self.masters if w.ndim > 1]
        vectors = [w for w in self.masters if w.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay},
             {"params": vectors, "weight_decay": 0.0}],
            lr=self.lr, betas=betas, fused=True, capturable=device.type == "cuda")

    def step(self, loss: Tensor) -> None:
        """One update from `loss` at learning rate `self.lr`."""
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        full = [torch.zeros_like(w) if g is None else g.float().contiguous()
                for g, w in zip(grads, self.masters, strict=True)]
        norm = torch.stack(torch._foreach_norm(full)).norm()
        torch._foreach_mul_(full, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        for master, grad in zip(self.masters, full, strict=True):
            master.grad = grad
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
            torch._foreach_lerp_(self.average, self.masters, 1 - self.ema)

    def averaged(self) -> nn.Module:
        """A float32 network with the averaged weights, frozen."""
        net = copy.deepcopy(self.net).float().eval().requires_grad_(False)
        with torch.no_grad():
            torch._foreach_copy_(list(net.parameters()), self.average)
        return net

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on."""
        out = {}
        for name, master, average in zip(self.names, self.masters, self.average, strict=True):
            kept = self.optimizer.state.get(master, {})
            out |= {f"master.{name}": master, f"average.{name}": average}
            out |= {f"{key}.{name}": value for key, value in kept.items()}
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """The reverse of `state`."""
        for name, master, average, param in zip(self.names, self.masters, self.average,
                                                self.params, strict=True):
            master.copy_(state[f"master.{name}"])
            average.copy_(state[f"average.{name}"])
            with torch.no_grad():
                param.copy_(master)
            kept = self.optimizer.state[master]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = state.get(f"{key}.{name}")
                if value is not None and key in kept:
                    kept[key].copy_(value)  # in place: a CUDA graph may hold it
                elif value is not None:
                    on_cpu = key == "step" and master.device.type == "cpu"
                    kept[key] = value.to("cpu" if on_cpu else master.device)


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
        return self.seconds - (time.monotonic() - self.start)


class OutOfTime(Exception):
    """The time of this call is used up; the state is on disk, start again to go on."""


def cosine(step: int, total: int, peak: float, warm: int = 200, floor: float = 0.02) -> float:
    """Learning rate: linear warm-up, then half a cosine from `peak` to `floor * peak`."""
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))) * (1 - floor) + floor
    return peak * min(1.0, (step + 1) / warm) * falling


class Stage:
    """One stage's state in `folder`: `<name>.safetensors` and `<name>.json`."""

    def __init__(self, name: str, folder: Path, total: int, clock: Clock) -> None:
        self.name, self.folder, self.total, self.clock = name, folder, total, clock
        self.path = folder / f"{name}.safetensors"
        self.facts: dict[str, object] = {"step": 0, "seconds": 0.0, "log": []}
        if (folder / f"{name}.json").exists():
            self.facts = json.loads((folder / f"{name}.json").read_text())

    @property
    def step(self) -> int:
        return int(self.facts["step"])  # type: ignore[call-overload]

    @property
    def done(self) -> bool:
        return self.step >= self.total

    def resume(self, trainees: dict[str, Trainee]) -> None:
        """Load the trainees where an earlier call left them."""
        if self.step and self.path.exists():
            tensors = load_file(self.path)
            for key, trainee in trainees.items():
                trainee.load({k.removeprefix(f"{key}/"): v for k, v in tensors.items()
                              if k.startswith(f"{key}/")})

    def save(self, trainees: dict[str, Trainee]) -> None:
        """Write the state (tensors first, so that the step never runs ahead of them)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path, {f"{key}/{name}": value for key, trainee in trainees.items()
                                  for name, value in trainee.state().items()})
        write_text(self.folder / f"{self.name}.json", json.dumps(self.facts))

    def run(self, trainees: dict[str, Trainee], step: Callable[[int], dict[str, Tensor]],
            every: int = 250) -> None:
        """Call `step(i)` for the steps that are left; it returns tensors to log.

        Raises:
            OutOfTime: before the last step, with the state saved.
        """
        start = time.monotonic()
        before = float(self.facts["seconds"])  # type: ignore[arg-type]
        while not self.done:
            if self.step % 20 == 0 and self.clock.left() < 0:
                self.save(trainees)
                raise OutOfTime(f"{self.name}: {self.step} of {self.total} steps")
            logged = step(self.step)
            self.facts["step"] = self.step + 1
            if self.step % every == 0 or self.done:
                self.facts["seconds"] = round(before + time.monotonic() - start, 1)
                line = {"step": self.step, "s": self.facts["seconds"],
                        **{k: round(float(v.detach()), 4) for k, v in logged.items()}}
                self.facts["log"].append(line)  # type: ignore[attr-defined]
                print(self.name, json.dumps(line), flush=True)
        self.save(trainees)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """safetensors by atomic rename."""
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Text by atomic rename."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)


def freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients."""
    return module.eval().requires_grad_(False)


def mean(values: Iterable[Tensor]) -> Tensor:
    """Mean of several scalars."""
    return torch.stack(list(values)).mean()
