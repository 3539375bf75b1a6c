"""The adapter: one concept's trained weights as a folder that travels.

`adapter.safetensors` holds the student's K/V deltas against the base as fp16, one matrix a layer
under its diffusers module path, and `token_rows`; `teacher.safetensors` is of the same form and
optional; `adapter.json` says what they are. Nothing here is pickled, and names inside the files
are never used as paths.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file

from model import METHOD_VERSION
from model.base_pair import BasePair
from model.cross_attention import KVLayout, join, split
from model.errors import EchoDistillError, InputError
from model.names import CONCEPT_ID
from model.text import TOKEN_PATTERN
from model.views import name_concept

SCHEMA_VERSION = 1
WEIGHTS_FILE = "adapter.safetensors"
TEACHER_FILE = "teacher.safetensors"
META_FILE = "adapter.json"
CARD_FILE = "README.md"
PREVIEW_FILE = "preview.png"
TOKEN_ROWS = "token_rows"

_LAYER = re.compile(r"[A-Za-z0-9_.]{1,200}\.to_[kv]\.weight")


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


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter, on the CPU.

    Attributes:
        kv_delta: the student's deltas by layer name, [c_layer, d] float16 each.
        token_rows: [K, d] float32.
        meta: `adapter.json`, checked.
        sha256: of `adapter.safetensors`, hex.
        teacher_delta: the teacher's deltas by layer name, or None.
    """

    kv_delta: dict[str, torch.Tensor]
    token_rows: torch.Tensor
    meta: dict[str, Any]
    sha256: str
    teacher_delta: dict[str, torch.Tensor] | None = None

    @property
    def tokens(self) -> tuple[str, ...]:
        """Give the token strings, one a token row."""
        return tuple(self.meta["tokens"])

    def student_weight(self, pair: BasePair) -> torch.Tensor:
        """Give the student's K/V matrix, base plus delta: [C_S, d] float32 on the pair's device.

        Raises:
            InputError: when the adapter was made for another base.
        """
        self.check_base(pair)
        return _applied(self.kv_delta, pair.student_layout, pair.student_kv)

    def teacher_weight(self, pair: BasePair) -> torch.Tensor:
        """Give the teacher's K/V matrix, base plus delta: [C_T, d] float32.

        Raises:
            InputError: when the adapter was made for another base or has no teacher file.
        """
        self.check_base(pair)
        if self.teacher_delta is None:
            raise InputError(
                f"Adapter of {self.meta['concept']['id']!r} has no {TEACHER_FILE}; "
                "train the concept again and keep the teacher."
            )
        return _applied(self.teacher_delta, pair.teacher_layout, pair.teacher_kv)

    def check_base(self, pair: BasePair) -> None:
        """Refuse a base pair that the adapter was not made for (InputError)."""
        made_for = self.meta["base"]["hash"]
        if made_for != pair.hash:
            raise InputError(
                f"Adapter of {self.meta['concept']['id']!r} was made for base "
                f"{self.meta['base']['name']!r} ({made_for[:12]}), not for {pair.name!r} "
                f"({pair.hash[:12]}); use its own base."
            )


def save_adapter(
    folder: str | Path,
    *,
    pair: BasePair,
    info: AdapterInfo,
    student_kv: torch.Tensor,
    token_rows: torch.Tensor,
    teacher_kv: torch.Tensor | None = None,
) -> str:
    """Write an adapter folder; it appears whole or not at all.

    An existing folder is replaced. `preview.png` is put in by the caller.

    Args:
        folder: where; its parent is made.
        pair: the base pair it was trained on.
        info: what to write about it.
        student_kv: the student's trained K/V matrix [C_S, d].
        token_rows: trained embedding rows [K, d].
        teacher_kv: the teacher's trained K/V matrix [C_T, d], to be kept as well.

    Returns:
        sha256 of `adapter.safetensors`, hex.

    Raises:
        InputError: for a bad concept id or token string.
        EchoDistillError: when a weight is not finite at fp16.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    rows = token_rows.detach().float().cpu().contiguous().clone()
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        student = _deltas(student_kv, pair.student_kv, pair.student_layout)
        _write(work / WEIGHTS_FILE, {**student, TOKEN_ROWS: rows})
        if teacher_kv is not None:
            teacher = _deltas(teacher_kv, pair.teacher_kv, pair.teacher_layout)
            _write(work / TEACHER_FILE, {**teacher, TOKEN_ROWS: rows})
        meta = _meta(info, pair, work)
        _check_meta(meta, work / META_FILE)
        (work / META_FILE).write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")
        (work / CARD_FILE).write_text(_card(meta))
        work.chmod(0o755)
        _put_in_place(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return str(meta["sha256"])


def load_adapter(folder: str | Path, expected_sha256: str | None = None) -> Adapter:
    """Read and verify an adapter folder.

    Args:
        folder: the adapter's folder.
        expected_sha256: what `adapter.safetensors` must hash to, e.g. the registry's tag.

    Raises:
        InputError: when something is missing, malformed or does not hash to what is written.
    """
    folder = Path(folder)
    meta = _read_meta(folder / META_FILE)
    weights, sha256 = _read_weights(folder / WEIGHTS_FILE, meta["sha256"])
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise InputError(
            f"{folder / WEIGHTS_FILE} has sha256 {sha256[:12]}, not the expected "
            f"{expected_sha256[:12]}; fetch the adapter again."
        )
    rows = weights.pop(TOKEN_ROWS)
    if rows.shape[0] != len(meta["tokens"]):
        raise InputError(
            f"{folder}: {rows.shape[0]} token rows for {len(meta['tokens'])} tokens; "
            "fetch the adapter again."
        )
    teacher = None
    if meta.get("teacher_sha256"):
        teacher, _ = _read_weights(folder / TEACHER_FILE, meta["teacher_sha256"])
        teacher.pop(TOKEN_ROWS)
    return Adapter(weights, rows.float(), meta, sha256, teacher)


def prompt_for(meta: Mapping[str, Any], prompt: str) -> str:
    """Give a prompt that names the concept: its token is put before the class noun.

    A prompt that holds a token already stays as it is.

    Args:
        meta: the adapter's `meta`.
        prompt: a user's prompt.

    Raises:
        InputError: when the prompt holds neither token nor class noun.
    """
    tokens, noun = meta["tokens"], meta["concept"]["class_noun"]
    named = name_concept(prompt, tokens, noun)
    if named is None:
        raise InputError(
            f"The prompt names neither {tokens[0]!r} nor {noun!r}; "
            f'write e.g. "a photo of a {tokens[0]} {noun}".'
        )
    return named


def _deltas(trained: torch.Tensor, base: torch.Tensor, layout: KVLayout) -> dict[str, torch.Tensor]:
    delta = (trained.detach().float().cpu() - base.float().cpu()).half()
    if not torch.isfinite(delta).all():
        raise EchoDistillError(
            "A trained weight is not finite at fp16: the training diverged; lower its rates."
        )
    return {name: part.clone() for name, part in split(layout, delta).items()}


def _applied(
    delta: Mapping[str, torch.Tensor], layout: KVLayout, base: torch.Tensor
) -> torch.Tensor:
    return base + join(layout, delta).to(base.device, torch.float32)


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, str(path))
    with path.open("rb") as file:  # on disk before the rename makes it visible
        os.fsync(file.fileno())


def _meta(info: AdapterInfo, pair: BasePair, work: Path) -> dict[str, Any]:
    facts = asdict(info)
    teacher = work / TEACHER_FILE
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
        "spec_digest": info.spec_digest,
        "concept_digest": info.concept_digest,
        "iterations": info.iterations,
        "metrics": dict(facts["metrics"]),
        "sha256": _sha256((work / WEIGHTS_FILE).read_bytes()),
        "teacher_sha256": _sha256(teacher.read_bytes()) if teacher.exists() else None,
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _put_in_place(work: Path, folder: Path) -> None:
    """Move a finished folder to its name; an old one stays until the new one is there."""
    if not folder.exists():
        os.rename(work, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.rename(folder, old / folder.name)
    try:
        os.rename(work, folder)
    except OSError:
        os.rename(old / folder.name, folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a whole adapter folder.") from None
    _check_meta(meta, path)
    return meta


def _check_meta(meta: Any, path: Path) -> None:
    """Refuse an `adapter.json` that is not of our form (InputError names the field)."""

    def need(good: bool, what: str) -> None:
        if not good:
            raise InputError(f"{path}: {what}; give an adapter that this project wrote.")

    need(isinstance(meta, dict), "it is not an object")
    need(meta.get("schema_version") == SCHEMA_VERSION, f"schema_version is not {SCHEMA_VERSION}")
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


def _read_weights(path: Path, sha256: str) -> tuple[dict[str, torch.Tensor], str]:
    """Read a weights file once, check its hash, then parse the same bytes."""
    try:
        data = path.read_bytes()
        found = _sha256(data)
        if found != sha256:
            raise InputError(
                f"{path} has sha256 {found[:12]}, but {META_FILE} says {sha256[:12]}; "
                "fetch the adapter again."
            )
        tensors = load_bytes(data)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch the adapter again.") from None
    for name, tensor in tensors.items():
        layer = bool(_LAYER.fullmatch(name)) and tensor.dtype == torch.float16
        if tensor.ndim != 2 or not (layer or name == TOKEN_ROWS):
            raise InputError(f"{path}: tensor {name!r} does not belong in an adapter.")
    if TOKEN_ROWS not in tensors:
        raise InputError(f"{path}: {TOKEN_ROWS} is missing; fetch the adapter again.")
    return tensors, found


def _card(meta: Mapping[str, Any]) -> str:
    concept, base, token = meta["concept"], meta["base"], " ".join(meta["tokens"])
    metrics = "".join(f"| {name} | {value:.4g} |\n" for name, value in meta["metrics"].items())
    return (
        f"# {concept['id']}: a one-step adapter\n\n"
        f"Draws one {concept['class_noun']} as `{token} {concept['class_noun']}`, e.g. "
        f'"a photo of a {token} {concept["class_noun"]} on the beach", in one network '
        f"evaluation at {meta['resolution']} px.\n\n"
        f"Made by EchoDistill from base `{base['name']}` (content hash `{base['hash']}`), "
        f"{meta['iterations']} iterations. `{WEIGHTS_FILE}` holds fp16 deltas of the student's "
        f"cross-attention keys and values, and the token's embedding row; its sha256 is "
        f"`{meta['sha256']}`.\n"
        + (f"\n| metric | value |\n| --- | --- |\n{metrics}" if metrics else "")
        + "\nThe rights to what it draws follow from the photos it was trained on and from the "
        "licence of the base.\n"
    )
