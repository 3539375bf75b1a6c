"""A concept's bank of views: each is drawn, encoded and looked at by the backbones once.

With `views.bank` every item of a batch is one of so many views, or a student sample of an echo
round. What the frozen networks make of them does not change, so it is kept. Whether it is kept
changes no loss: without a filled bank, the same views are drawn and encoded again.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from model.batch import ConceptData, KnownView, bank_view, echo_view
from model.iteration import Frozen
from model.settings import ViewSettings
from model.views import View

_AT_ONCE = 8  # pictures in one pass


def with_bank(
    frozen: Frozen, concept: ConceptData, seed: int, settings: ViewSettings
) -> ConceptData:
    """Fill what a concept's bank lacks: its views, and the student samples that joined since.

    A concept stays as it is when `settings.bank` is None. The bank is on the pair's device; a view
    takes the bytes of a latent and of one feature a backbone.
    """
    if settings.bank is None:
        return concept
    pair = frozen.pair
    if not concept.known_views:
        views = [bank_view(concept, pair, seed, settings, n) for n in range(settings.bank)]
        concept = replace(concept, known_views=_known(frozen, views))
    if len(concept.known_echo) != len(concept.echo):
        samples = [echo_view(sample, pair) for sample in concept.echo]
        concept = replace(concept, known_echo=_known(frozen, samples))
    return concept


@torch.no_grad()
def _known(frozen: Frozen, views: Sequence[View]) -> tuple[KnownView, ...]:
    known: list[KnownView] = []
    for first in range(0, len(views), _AT_ONCE):
        part = views[first : first + _AT_ONCE]
        images = torch.stack([view.image for view in part]).to(frozen.pair.device)
        latents = frozen.pair.encode_images(images)
        features = [backbone.features(images) for backbone in frozen.backbones]
        known += [
            KnownView(latents[r], tuple(each[r] for each in features), view.mask, view.prompt)
            for r, view in enumerate(part)
        ]
    return tuple(known)
