"""Pictures from student and teacher.

`draw` is the one function that makes a concept's pictures: endpoint, registry model, evaluation
and demo all call it, so that the same seed gives the same picture everywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model.adapter import Adapter
from model.base_pair import BasePair
from model.cross_attention import keys_values
from model.randomness import generator, normal
from model.schedule import NoiseSchedule
from model.settings import TEACHER_STEPS
from model.text import Prompts, cat, encode, tokenize

TEACHER_GUIDANCE = 7.5
_Rows = slice | torch.Tensor
_CONCEPT_FREE = "picture"  # noise is keyed by the seed alone, not by who asks


def sample_student(
    pair: BasePair, kv: torch.Tensor, noise: torch.Tensor, steps: int | Sequence[int] = 1
) -> torch.Tensor:
    """Draw with the student in 1, 2 or 4 trailing steps, without guidance.

    Args:
        pair: the base pair.
        kv: keys and values [R, L, C_S].
        noise: standard normal [R, c, h, w]; a row of one step takes it by the base's `noise_scale`.
        steps: network evaluations, one number for all or one a row.

    Returns:
        images [R, 3, S, S] in [-1, 1], float32.

    Raises:
        InputError: for a number of steps outside 1..1000.
    """
    schedule = pair.student_schedule

    def predict(z_t: torch.Tensor, t: torch.Tensor, rows: _Rows) -> torch.Tensor:
        return pair.denoise(pair.student, z_t, t, kv[rows])

    counts = [steps] * len(noise) if isinstance(steps, int) else steps
    plans = [schedule.timesteps(count, "trailing") for count in counts]
    scales = torch.tensor([schedule.start_scale(count) for count in counts], dtype=noise.dtype)
    start = noise.to(pair.device) * scales.view(-1, 1, 1, 1).to(pair.device)
    z = _ddim(predict, schedule, start, plans, final_abar=1.0)
    return pair.decode(z).clamp(-1, 1)


def sample_teacher(
    pair: BasePair,
    kv: torch.Tensor,
    kv_uncond: torch.Tensor,
    noise: torch.Tensor,
    steps: int = TEACHER_STEPS,
    guidance: float = TEACHER_GUIDANCE,
) -> torch.Tensor:
    """Draw with the teacher: deterministic DDIM with classifier-free guidance.

    Args:
        pair: the base pair.
        kv: keys and values of the prompts [R, L, C_T].
        kv_uncond: those of the empty prompt [R, L, C_T].
        noise: standard normal [R, c, h, w].
        steps: DDIM steps, spaced as the teacher's scheduler says.
        guidance: scale; 1 leaves the empty prompt out.

    Returns:
        images [R, 3, S, S] in [-1, 1], float32.
    """
    schedule = pair.teacher_schedule
    both = torch.cat([kv_uncond, kv])

    def predict(z_t: torch.Tensor, t: torch.Tensor, _rows: _Rows) -> torch.Tensor:
        if guidance == 1:
            return pair.denoise(pair.teacher, z_t, t, kv)
        out = pair.denoise(pair.teacher, torch.cat([z_t, z_t]), torch.cat([t, t]), both)
        uncond, cond = out.chunk(2)
        return uncond + guidance * (cond - uncond)

    plans = [schedule.timesteps(steps)] * len(noise)
    start = noise.to(pair.device) * schedule.initial_scale
    z = _ddim(predict, schedule, start, plans, schedule.final_abar)
    return pair.decode(z).clamp(-1, 1)


@torch.no_grad()
def draw(
    pair: BasePair,
    adapters: Sequence[Adapter | None],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | Sequence[int] = 1,
) -> torch.Tensor:
    """Draw R pictures with the student; each row has its own adapter, prompt and seed.

    Args:
        pair: the base pair.
        adapters: R adapters, in any mixture; None is the bare base.
        prompts: R prompts that hold their adapter's token (see `adapter.prompt_for`).
        seeds: R seeds; the i-th image of one request has seed + i.
        steps: network evaluations, one number for all or one a row.

    Returns:
        uint8 [R, 3, S, S] on the CPU. A row does not depend on the other rows but for round-off.
    """
    kv = student_keys_values(pair, adapters, prompts)
    return to_uint8(sample_student(pair, kv, picture_noise(pair, seeds), steps))


@torch.no_grad()
def draw_teacher(
    pair: BasePair,
    adapters: Sequence[Adapter | None],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = TEACHER_STEPS,
    guidance: float = TEACHER_GUIDANCE,
) -> torch.Tensor:
    """Draw R pictures with the (adapted) teacher; otherwise as `draw`."""
    kv = teacher_keys_values(pair, adapters, prompts)
    kv_uncond = teacher_keys_values(pair, adapters, [""] * len(prompts))
    noise = picture_noise(pair, seeds)
    return to_uint8(sample_teacher(pair, kv, kv_uncond, noise, steps, guidance))


@torch.no_grad()
def student_keys_values(
    pair: BasePair, adapters: Sequence[Adapter | None], prompts: Sequence[str]
) -> torch.Tensor:
    """Compute what the student needs of R (adapter, prompt) pairs: [R, L, C_S].

    It depends on nothing else, so a server may cache it.
    """

    def weight(adapter: Adapter | None) -> torch.Tensor:
        return pair.student_kv if adapter is None else adapter.student_weight(pair)

    return _keys_values(pair, adapters, prompts, weight)


@torch.no_grad()
def teacher_keys_values(
    pair: BasePair, adapters: Sequence[Adapter | None], prompts: Sequence[str]
) -> torch.Tensor:
    """Compute what the teacher needs of R (adapter, prompt) pairs: [R, L, C_T]."""

    def weight(adapter: Adapter | None) -> torch.Tensor:
        return pair.teacher_kv if adapter is None else adapter.teacher_weight(pair)

    return _keys_values(pair, adapters, prompts, weight)


@torch.no_grad()
def text_states(
    pair: BasePair, adapters: Sequence[Adapter | None], prompts: Sequence[str]
) -> torch.Tensor:
    """Encode the prompts of R (adapter, prompt) pairs: [R, L, d]."""
    tokenized = _tokenize(pair, adapters, prompts)
    return encode(pair.text_encoder, tokenized, _token_rows(pair, adapters))


def picture_noise(pair: BasePair, seeds: Sequence[int]) -> torch.Tensor:
    """Draw the start noise of R pictures [R, c, h, w] on the CPU, each from its seed alone."""
    draws = [generator(seed, _CONCEPT_FREE, 0, "noise") for seed in seeds]
    return torch.stack([normal(pair.latent_shape, gen) for gen in draws])


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Turn images in [-1, 1] into uint8 on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def _keys_values(
    pair: BasePair,
    adapters: Sequence[Adapter | None],
    prompts: Sequence[str],
    weight: Callable[[Adapter | None], torch.Tensor],
) -> torch.Tensor:
    distinct = list({id(a): a for a in adapters}.values())
    place = {id(adapter): n for n, adapter in enumerate(distinct)}
    concept = torch.tensor([place[id(adapter)] for adapter in adapters])
    states = text_states(pair, adapters, prompts)
    return keys_values(states, torch.stack([weight(a) for a in distinct]), concept)


def _tokenize(
    pair: BasePair, adapters: Sequence[Adapter | None], prompts: Sequence[str]
) -> Prompts:
    rows = zip(adapters, prompts, strict=True)
    return cat([tokenize(pair.tokenizer, [p], a.tokens if a else ()) for a, p in rows])


def _token_rows(pair: BasePair, adapters: Sequence[Adapter | None]) -> torch.Tensor:
    """Stack the rows' token embeddings [R, K, d]; unused places are 0 and never looked at."""
    most = max([len(a.token_rows) for a in adapters if a] or [1])
    rows = torch.zeros(len(adapters), most, pair.student_kv.shape[1])
    for r, adapter in enumerate(adapters):
        if adapter is not None:
            rows[r, : len(adapter.token_rows)] = adapter.token_rows
    return rows


def _ddim(
    predict: Callable[[torch.Tensor, torch.Tensor, _Rows], torch.Tensor],
    schedule: NoiseSchedule,
    z: torch.Tensor,
    plans: Sequence[Sequence[int]],
    final_abar: float,
) -> torch.Tensor:
    """Deterministic DDIM from states `z` [R, c, h, w] to latents; equal to Euler's steps.

    Each row follows its own plan of time steps; `predict` sees the rows that have steps left.
    """
    # All copies to the device come first: one between two networks would let the device run dry.
    for step in [_step(k, plans, final_abar, schedule, z) for k in range(max(map(len, plans)))]:
        z_t = z[step.rows]
        prediction = predict(z_t, step.t, step.rows)
        x0 = schedule.x0(prediction, z_t, step.t)
        eps = schedule.eps(prediction, z_t, step.t)
        moved = step.signal * x0 + step.rest * eps
        z = moved if isinstance(step.rows, slice) else z.index_copy(0, step.rows, moved)
    return z


@dataclass(frozen=True)
class _Step:
    """One step of the r rows that have it; all tensors are on the device.

    Attributes:
        rows: their places [r], or a slice of all.
        t: their time steps [r].
        signal: what the estimate of `z_0` is multiplied by [r, 1, 1, 1].
        rest: what the noise is multiplied by [r, 1, 1, 1].
    """

    rows: _Rows
    t: torch.Tensor
    signal: torch.Tensor
    rest: torch.Tensor


def _step(
    k: int,
    plans: Sequence[Sequence[int]],
    final_abar: float,
    schedule: NoiseSchedule,
    like: torch.Tensor,
) -> _Step:
    left = [r for r, plan in enumerate(plans) if k < len(plan)]
    following = [plans[r][k + 1 : k + 2] for r in left]
    abars = [float(schedule.abar[after[0]]) if after else final_abar for after in following]
    abar = torch.tensor(abars, dtype=torch.float64).view(-1, 1, 1, 1)
    signal, rest = (part.sqrt().to(like.device, like.dtype) for part in (abar, 1 - abar))
    whole = len(left) == len(plans)
    rows = slice(None) if whole else torch.tensor(left, device=like.device)
    t = torch.tensor([plans[r][k] for r in left], device=like.device)
    return _Step(rows, t, signal, rest)
