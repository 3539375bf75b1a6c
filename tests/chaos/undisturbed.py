"""What the concepts of a batch are trained to when nothing happens: the loop alone, no Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from components.ingest.concept_folder import Concept
from components.ingest.store import resolve_model
from components.spec import RunSpec, with_settings
from components.train.alone import train_alone
from model.adapter import load_adapter
from model.base_pair import load_base_pair
from model.concept import initial_row


def train_undisturbed(spec: RunSpec, packs: Sequence[Sequence[Concept]], out: str) -> None:
    """Train packs on this rank; the adapter folders are `<out>/<concept id>`."""
    here = with_settings(spec, [f'train.storage_path="{out}/runs"'])
    for pack in packs:
        for made in train_alone(here, pack):
            assert made.adapter_dir is not None, made.error
            made.adapter_dir.rename(Path(out) / made.id)


def differences(
    spec: RunSpec, concepts: Sequence[Concept], found: Path, expected: Path
) -> dict[str, float]:
    """Return how far adapters are apart, by concept id: 0 for equal files, else the largest
    difference of a weight as a part of the largest movement that training made (NaN where nothing
    moved); infinite for one that was not found."""
    places = [resolve_model(ref) for ref in (spec.base.teacher, spec.base.student)]
    pair = load_base_pair(*places, name=spec.base.name, resolution=spec.resolution)
    apart = {}
    for concept in concepts:
        if not (found / concept.id).exists():
            apart[concept.id] = math.inf
            continue
        one, other = (load_adapter(folder / concept.id) for folder in (found, expected))
        row = initial_row(pair, concept.initializer or concept.class_noun).cpu()[None]
        pairs = [
            (one.student_weight(pair), other.student_weight(pair), pair.student_kv),
            (one.token_rows, other.token_rows, row),
        ]
        parts = [(a - b).abs().max() / (b - start).abs().max() for a, b, start in pairs]
        # Python's max() may lose a NaN (of what never moved), torch's does not.
        apart[concept.id] = 0.0 if one.sha256 == other.sha256 else float(torch.stack(parts).max())
    return apart
