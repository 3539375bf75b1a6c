"""The echo stage: the student's own samples join the references (METHOD.md "Echo").

One step, or a few, make a sample nearly free. Those nearest to the references by identity are kept;
teacher and student then go on training on the enlarged set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from model.batch import ConceptData, EchoSample
from model.concept import StudentWeights, TeacherWeights
from model.identity import identity_features
from model.iteration import Frozen
from model.metrics import mean_cosine
from model.randomness import generator, integer, normal
from model.sampler import sample_student, to_uint8
from model.settings import EchoSettings
from model.text import tokenize
from model.views import TEMPLATES, square

CONTEXTS = (
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a photo of a {} in the forest",
    "a photo of a {} in the city",
    "a photo of a {} on a wooden floor",
    "a photo of a {} on a red background",
    "a photo of a {} on a white background",
    "a photo of a {} in front of a mountain",
    "a photo of a {} on a green field",
    "a photo of a {} in a room",
    "a photo of a {} on the street",
    "a photo of a {} at night",
)
"""Context prompts; every second sample is drawn under one, the others under a template."""

_BATCH = 8


@dataclass(frozen=True, eq=False)
class EchoRound:
    """One concept's round.

    Attributes:
        kept: the samples that join the references, best first.
        similarities: identity similarity to the references of every sample drawn, in order.
        drawn: every sample, in order, for the log.
    """

    kept: tuple[EchoSample, ...]
    similarities: tuple[float, ...]
    drawn: tuple[EchoSample, ...]


@torch.no_grad()
def echo_round(
    frozen: Frozen,
    teacher: TeacherWeights,
    student: StudentWeights,
    concepts: Sequence[ConceptData],
    settings: EchoSettings,
    *,
    seed: int,
    iteration: int,
) -> list[EchoRound]:
    """Draw and filter one round of student samples for every concept of a pack.

    The same on every rank but for an accelerator's round-off: let one rank draw and send to the
    others, since a sample's rank in the filter could turn on it.

    Args:
        frozen: the frozen networks.
        teacher: the teacher's weights, for the token rows.
        student: the student's weights.
        concepts: the pack, in order.
        settings: how many samples, in how many steps, and which part of them is kept.
        seed: the run's seed.
        iteration: the iteration that the round comes before; keys its draws.
    """
    rounds = []
    for n, concept in enumerate(concepts):
        samples: list[EchoSample] = []
        for first in range(0, settings.samples, _BATCH):
            items = range(first, min(first + _BATCH, settings.samples))
            samples += _draw(
                frozen, teacher, student, concept, n, seed, iteration, items, settings.steps
            )
        similarities = _similarities(frozen, concept, samples)
        rounds.append(
            EchoRound(_best(samples, similarities, settings), similarities, tuple(samples))
        )
    return rounds


def _draw(
    frozen: Frozen,
    teacher: TeacherWeights,
    student: StudentWeights,
    concept: ConceptData,
    n: int,
    seed: int,
    iteration: int,
    items: Sequence[int],
    steps: int,
) -> list[EchoSample]:
    """Draw some samples of the n-th concept; each depends on its item number alone."""
    pair = frozen.pair
    prompts, noise = [], []
    for item in items:
        choices = CONTEXTS if item % 2 else TEMPLATES
        gen = generator(seed, concept.id, iteration, "echo-prompt", item)
        prompts.append(choices[integer(0, len(choices) - 1, gen)].format(concept.text.phrase))
        gen = generator(seed, concept.id, iteration, "echo-noise", item)
        noise.append(normal(pair.latent_shape, gen))
    place = torch.full((len(prompts),), n)
    tokenized = tokenize(pair.tokenizer, prompts, [concept.text.token])
    text_states, _ = teacher(pair.text_encoder, tokenized, place)
    kv = student(pair.text_encoder, tokenized, place, text_states)
    images = sample_student(pair, kv, torch.stack(noise), steps)
    return [EchoSample(i, p) for i, p in zip(to_uint8(images), prompts, strict=True)]


def _similarities(
    frozen: Frozen, concept: ConceptData, samples: Sequence[EchoSample]
) -> tuple[float, ...]:
    """Mean identity cosine of each sample to the reference images."""
    size = frozen.pair.resolution
    references = torch.cat([_identity(frozen, square(i, size)[None]) for i in concept.images])
    features = torch.cat([_identity(frozen, sample.image[None]) for sample in samples])
    return tuple(mean_cosine(features, references).tolist())


def _identity(frozen: Frozen, images: torch.Tensor) -> torch.Tensor:
    x = images.to(frozen.pair.device).float() / 127.5 - 1
    features = identity_features(frozen.identity(x), frozen.projection)
    return F.normalize(features, dim=-1).flatten(1)  # tokens weigh the same in the cosine


def _best(
    samples: Sequence[EchoSample], similarities: Sequence[float], settings: EchoSettings
) -> tuple[EchoSample, ...]:
    order = sorted(range(len(samples)), key=lambda i: -similarities[i])
    return tuple(samples[i] for i in order[: max(1, round(settings.keep * len(samples)))])
