"""What an adapter says about itself: `adapter.json`, its check, and the model card.

Schema version 2 may hold low-rank factors (`rank`, `teacher_rank` and their errors); version 1 is
the same with whole deltas alone, and is read for ever.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model import METHOD_VERSION
from model.errors import InputError
from model.names import CONCEPT_ID, TOKEN_PATTERN

if TYPE_CHECKING:  # the networks' libraries take seconds
    from model.base_pair import BasePair

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
WEIGHTS_FILE = "adapter.safetensors"
TEACHER_FILE = "teacher.safetensors"
META_FILE = "adapter.json"
CARD_FILE = "README.md"
PREVIEW_FILE = "preview.png"


@dataclass(frozen=True)
class AdapterInfo:
    """What a training run knows about the adapter that it made.

    Attributes:
        concept_id: the concept's id.
        class_noun: e.g. `dog`.
        tokens: the concept's token strings, e.g. `("<new1>",)`, one a token row.
        initializer: the word that the token began as.
        live: whether the subject is alive.
        base_name: the user's name of the base pair.
        teacher_id: where the teacher came from (id, path or URI).
        student_id: where the student came from.
        spec_digest: digest of the spec fields that change the result.
        concept_digest: digest of concept, spec and base.
        iterations: iterations trained.
        metrics: figures by name.
    """

    concept_id: str
    class_noun: str
    tokens: tuple[str, ...]
    initializer: str = ""
    live: bool = False
    base_name: str = ""
    teacher_id: str = ""
    student_id: str = ""
    spec_digest: str = ""
    concept_digest: str = ""
    iterations: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


def describe(info: AdapterInfo, pair: BasePair) -> dict[str, Any]:
    """Give the `adapter.json` of a new adapter, with whole deltas; hashes come later."""
    return {
        "schema_version": SCHEMA_VERSION,
        "method_version": METHOD_VERSION,
        "concept": {
            "id": info.concept_id,
            "class_noun": info.class_noun,
            "initializer": info.initializer,
            "live": info.live,
        },
        "tokens": list(info.tokens),
        "base": {
            "name": info.base_name or pair.name,
            "teacher": info.teacher_id,
            "student": info.student_id,
            "hash": pair.hash,
        },
        "resolution": pair.resolution,
        "rank": None,
        "rank_error": None,
        "teacher_rank": None,
        "teacher_rank_error": None,
        "spec_digest": info.spec_digest,
        "concept_digest": info.concept_digest,
        "iterations": info.iterations,
        "metrics": dict(info.metrics),
        "sha256": None,
        "teacher_sha256": None,
    }


def check_meta(meta: Any, path: Path) -> None:
    """Refuse an `adapter.json` that is not of our form (InputError names the field)."""

    def need(good: bool, what: str) -> None:
        if not good:
            raise InputError(f"{path}: {what}; give an adapter that this project wrote.")

    need(isinstance(meta, dict), "it is not an object")
    need(
        meta.get("schema_version") in READABLE_VERSIONS,
        f"schema_version {meta.get('schema_version')!r} is not one of {READABLE_VERSIONS}",
    )
    concept, base = meta.get("concept"), meta.get("base")
    need(isinstance(concept, dict) and isinstance(base, dict), "concept or base is missing")
    need(
        isinstance(concept.get("id"), str) and bool(CONCEPT_ID.fullmatch(concept["id"])),
        f"concept id {concept.get('id')!r} is not allowed",
    )
    noun = concept.get("class_noun")
    need(isinstance(noun, str) and bool(noun.strip()) and len(noun) <= 200, "class_noun is missing")
    tokens = meta.get("tokens")
    need(isinstance(tokens, list) and 1 <= len(tokens) <= 16, "tokens are missing")
    for token in tokens:
        need(
            isinstance(token, str) and bool(TOKEN_PATTERN.fullmatch(token)),
            f"token {token!r} is not of the form <name>",
        )
    need(len(set(tokens)) == len(tokens), "a token is there twice")
    for owner, key in ((base, "hash"), (meta, "sha256")):
        value = owner.get(key)
        need(isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)), f"{key} is bad")
    need(isinstance(base.get("name"), str), "base name is missing")
    need(isinstance(meta.get("resolution"), int), "resolution is missing")
    need(isinstance(meta.get("metrics", {}), dict), "metrics are not an object")
    for key in ("rank", "teacher_rank"):
        rank = meta.get(key)
        need(rank is None or (isinstance(rank, int) and rank > 0), f"{key} is not a rank")


def card(meta: Mapping[str, Any]) -> str:
    """Write the model card."""
    concept, base, token = meta["concept"], meta["base"], " ".join(meta["tokens"])
    metrics = "".join(f"| {name} | {value:.4g} |\n" for name, value in meta["metrics"].items())
    return (
        f"# {concept['id']}: a one-step adapter\n\n"
        f"Draws one {concept['class_noun']} as `{token} {concept['class_noun']}`, e.g. "
        f'"a photo of a {token} {concept["class_noun"]} on the beach", in one network '
        f"evaluation at {meta['resolution']} px.\n\n"
        f"Made by EchoDistill from base `{base['name']}` (content hash `{base['hash']}`), "
        f"{meta['iterations']} iterations. `{WEIGHTS_FILE}` holds fp16 deltas of the student's "
        f"cross-attention keys and values{_rank(meta)}, and the token's embedding row; its sha256 "
        f"is `{meta['sha256']}`.\n"
        + (f"\n| metric | value |\n| --- | --- |\n{metrics}" if metrics else "")
        + "\nThe rights to what it draws follow from the photos it was trained on and from the "
        "licence of the base.\n"
    )


def _rank(meta: Mapping[str, Any]) -> str:
    error = meta["rank_error"]
    if meta["rank"] is None or error is None:
        return ""
    return (
        f", as factors of rank {meta['rank']} (against the trained ones, the weights are off by "
        f"{error['weights']:.1%} and the pictures by {error['pictures']:.2f} of 255 levels)"
    )
