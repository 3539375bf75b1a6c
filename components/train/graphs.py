"""CUDA graphs: the frozen networks' work of an iteration, recorded once and replayed from then on.

A GPU that is given thousands of small kernels one by one waits for the program most of the time.
A recording is started as a whole. What is trained stays outside, with its engines: token rows, keys
and values go in, their gradients come out and are handed to the engine's own backward pass. Losses,
features and gradients of a pass are copied out, so any number of passes may follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from model.batch import Batch
from model.discriminators import DiscriminatorHeads
from model.iteration import (
    Frozen,
    StudentLoss,
    answered_with,
    drawn_with,
    guidance_keys_values,
    reconstruction_loss,
    student_loss,
)
from model.packing import per_row
from model.settings import LossSettings
from model.text import Prompts, encode

Tensors = tuple[torch.Tensor, ...]
Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes work that reads and writes the same tensors every time; returns what does it again."""

_WARM_UP = 3  # what is allocated, chosen or compiled at first is there before the recording begins


def cuda_graphs() -> Record:
    """Record into CUDA graphs that share their memory: they must be replayed one at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], None]) -> Callable[[], None]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Nothing can be compiled within a recording; like this torch says what had changed.
        settled = torch.compiler.set_stance("fail_on_recompile")
        # Other threads, such as a collective's watchdog, may go on meanwhile.
        with settled, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return record


class RecordedItems:
    """METHOD.md's items 1 to 5 of one pack, with their work on the frozen networks recorded.

    The heads' parameters must keep their places in memory, which ZeRO stage 3 does not grant, and
    every batch must have the first one's shapes.
    """

    def __init__(
        self, frozen: Frozen, heads: DiscriminatorHeads, settings: LossSettings, record: Record
    ) -> None:
        """Record nothing yet; the first batch's shapes are not known."""
        self._frozen, self._heads, self._settings = frozen, heads, settings
        self._names: tuple[str, ...] = ()
        self._batch: Batch | None = None
        self._read = _Recorded(self._text_states, record)
        self._read_back = _Recorded(self._row_gradient, record)
        self._teach = _Recorded(self._taught, record)
        self._distil = _Recorded(self._distilled, record)
        self._look = _Recorded(self._looked, record)

    @property
    def complete(self) -> bool:
        """Tell whether an iteration has been recorded to its end."""
        return self._distil.done

    def teacher_loss(self, teacher: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Do as `model.iteration.teacher_loss`."""
        encoder = self._frozen.pair.text_encoder
        rows = per_row(teacher.rows, batch.concept)
        read = _Read.apply(rows, batch.prompts.to(rows.device), self._read, self._read_back)
        text_states, kv = teacher(encoder, None, batch.concept, read)
        loss, gradient = self._teach(kv, *self._tensors(batch))
        return _Handed.apply(loss, kv, gradient, batch.concept), text_states.detach()

    def student_loss(
        self, student: Any, teacher: Any, text_states: torch.Tensor, batch: Batch
    ) -> StudentLoss:
        """Do as `student_draw`, `alignment_target` and `student_loss` of `model.iteration`."""
        encoder = self._frozen.pair.text_encoder
        kv = student(encoder, batch.prompts, batch.concept, text_states)
        guidance = guidance_keys_values(self._frozen, teacher, text_states, batch)
        total, gradient, *more = self._distil(kv, guidance, *self._tensors(batch))
        count = len(self._names)
        parts = dict(zip(self._names, more[:count], strict=True))
        return StudentLoss(_Handed.apply(total, kv, gradient, batch.concept), parts, more[count:])

    def seen(self, batch: Batch) -> Batch:
        """Give the batch with what the backbones make of its pictures, as item 5 asks for it."""
        if batch.known is not None:
            return batch
        return replace(batch, known=(batch.noise, self._look(batch.images)))

    @torch.no_grad()
    def _text_states(self, rows: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor) -> Tensors:
        return (encode(self._frozen.pair.text_encoder, Prompts(ids, slots), rows),)

    def _row_gradient(
        self, gradient: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor
    ) -> Tensors:
        # Encoded once more: it is a hundredth of an iteration, and a recording of its own.
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            states = encode(self._frozen.pair.text_encoder, Prompts(ids, slots), rows)
        return torch.autograd.grad(states, rows, gradient)

    def _taught(self, kv: torch.Tensor, *tensors: torch.Tensor) -> Tensors:
        kv = kv.detach().requires_grad_()
        loss = reconstruction_loss(self._frozen, kv, self._of(tensors), self._settings)
        return loss.detach(), *torch.autograd.grad(loss.sum(), kv)

    def _distilled(
        self, kv: torch.Tensor, guidance: torch.Tensor, *tensors: torch.Tensor
    ) -> Tensors:
        frozen, settings, batch = self._frozen, self._settings, self._of(tensors)
        kv = kv.detach().requires_grad_()
        drawn = drawn_with(frozen, kv, batch)
        target = answered_with(frozen, guidance, drawn, batch, settings)
        loss = student_loss(frozen, self._heads, drawn, target, batch, settings)
        self._names = tuple(loss.parts)
        gradient = torch.autograd.grad(loss.total.sum(), kv)
        return loss.total.detach(), *gradient, *loss.parts.values(), *loss.fake_features

    @torch.no_grad()
    def _looked(self, images: torch.Tensor) -> Tensors:
        return tuple(backbone.features(images) for backbone in self._frozen.backbones)

    def _tensors(self, batch: Batch) -> Tensors:
        """Give what the frozen networks see of a batch."""
        self._batch = self._batch or batch
        directions = () if batch.directions is None else (batch.directions,)
        known = () if batch.known is None else (batch.known[0],)
        return batch.images, batch.masks, batch.noise, batch.t, batch.t_align, *directions, *known

    def _of(self, tensors: Tensors) -> Batch:
        """Give the batch that such tensors are of."""
        assert self._batch is not None
        images, masks, noise, t, t_align, *more = tensors
        directions = None if self._batch.directions is None else more.pop(0)
        known = None if self._batch.known is None else (more.pop(0), ())
        return replace(
            self._batch,
            images=images,
            masks=masks,
            noise=noise,
            t=t,
            t_align=t_align,
            directions=directions,
            known=known,
        )


class _Recorded:
    """A function of tensors that is recorded at its first call and replayed at every one."""

    def __init__(self, function: Callable[..., Tensors], record: Record) -> None:
        self._function, self._record = function, record
        self._replay: Callable[[], None] | None = None
        self._inputs: Sequence[torch.Tensor] = ()
        self._outputs: Tensors = ()

    @property
    def done(self) -> bool:
        return self._replay is not None

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        if self._replay is None:
            self._inputs = [each.detach().clone() for each in inputs]
            self._replay = self._record(self._run)
        for mine, given in zip(self._inputs, inputs, strict=True):
            assert mine.shape == given.shape, "a recording is for batches of one shape"
            mine.copy_(given.detach())
        self._replay()
        return tuple(each.clone() for each in self._outputs)

    def _run(self) -> None:
        self._outputs = self._function(*self._inputs)


class _Read(torch.autograd.Function):
    """The text states [R, L, d] of prompts with rows [R, K, d], with gradient to the rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, prompts: Prompts, read: _Recorded, back: _Recorded
    ) -> torch.Tensor:
        (states,) = read(rows, prompts.ids, prompts.slots)
        if not back.done:  # the backward pass is no place to record in
            back(torch.zeros_like(states), rows, prompts.ids, prompts.slots)
        ctx.save_for_backward(rows, prompts.ids, prompts.slots)
        ctx.back = back
        return states

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.back(grads[0], *ctx.saved_tensors)
        return gradient, None, None, None


class _Handed(torch.autograd.Function):
    """A loss [N] whose gradient to the keys and values of its rows is known already."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        kv: torch.Tensor,
        gradient: torch.Tensor,
        concept: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        ctx.concept = concept
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        share = per_row(grads[0], ctx.concept).to(gradient.dtype)
        return None, gradient * share.view(-1, 1, 1), None, None
