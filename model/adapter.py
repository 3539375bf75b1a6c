"""The adapter: one concept's trained weights as a folder that travels.

`adapter.safetensors` holds the student's K/V deltas against the base as fp16, whole or as low-rank
factors (`low_rank.py` has the names), and `token_rows`; `teacher.safetensors` is of the same form
and optional; `adapter.json` says what they are. Nothing here is pickled, and names inside the
files are never used as paths.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from model.adapter_meta import (
    CARD_FILE,
    META_FILE,
    TEACHER_FILE,
    WEIGHTS_FILE,
    AdapterInfo,
    card,
    check_meta,
    describe,
)
from model.errors import EchoDistillError, InputError
from model.kv_layout import KVLayout, join, split
from model.low_rank import whole
from model.views import name_concept

if TYPE_CHECKING:  # the networks' libraries take seconds
    from model.base_pair import BasePair

TOKEN_ROWS = "token_rows"

_PART = re.compile(r"[A-Za-z0-9_.]{1,200}\.to_[kv]\.(lora_[AB]\.)?weight")


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, on the CPU.

    Attributes:
        kv_delta: the student's deltas as they are stored, float16, by stored name: whole [c_layer,
            d], or factors (`low_rank.whole` gives whole ones of either).
        token_rows: [K, d] float32.
        meta: `adapter.json`.
        sha256: of `adapter.safetensors`, hex; empty before it is written.
        teacher_delta: the teacher's deltas, the same, or None.
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
                f"({pair.hash[:12]}); use its own base, or train the concept again on this one."
            )


def trained_adapter(
    *,
    pair: BasePair,
    info: AdapterInfo,
    student_kv: torch.Tensor,
    token_rows: torch.Tensor,
    teacher_kv: torch.Tensor | None = None,
) -> Adapter:
    """Make an adapter with whole deltas of what was trained; it is not written yet.

    Args:
        pair: the base pair it was trained on.
        info: what to write about it.
        student_kv: the student's trained K/V matrix [C_S, d].
        token_rows: trained embedding rows [K, d].
        teacher_kv: the teacher's trained K/V matrix [C_T, d], to be kept as well.

    Raises:
        EchoDistillError: when a weight is not finite at fp16.
    """
    student = _deltas(student_kv, pair.student_kv, pair.student_layout)
    teacher = None
    if teacher_kv is not None:
        teacher = _deltas(teacher_kv, pair.teacher_kv, pair.teacher_layout)
    rows = token_rows.detach().float().cpu().contiguous().clone()
    return Adapter(student, rows, describe(info, pair), "", teacher)


def write_adapter(folder: str | Path, adapter: Adapter) -> str:
    """Write an adapter folder; it appears whole or not at all.

    An existing folder is replaced. `preview.png` is put in by the caller.

    Args:
        folder: where; its parent is made.
        adapter: what to write.

    Returns:
        sha256 of `adapter.safetensors`, hex.

    Raises:
        InputError: for a bad concept id or token string.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    rows = {TOKEN_ROWS: adapter.token_rows}
    hashes: dict[str, str | None] = {"teacher_sha256": None}
    try:
        hashes["sha256"] = _write(work / WEIGHTS_FILE, {**adapter.kv_delta, **rows})
        if adapter.teacher_delta is not None:
            teacher = {**adapter.teacher_delta, **rows}
            hashes["teacher_sha256"] = _write(work / TEACHER_FILE, teacher)
        meta = {**adapter.meta, **hashes}
        check_meta(meta, work / META_FILE)
        (work / META_FILE).write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")
        (work / CARD_FILE).write_text(card(meta))
        work.chmod(0o755)
        _put_in_place(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return str(meta["sha256"])


def save_adapter(folder: str | Path, **trained: Any) -> str:
    """Write what was trained with whole deltas: `trained_adapter`, then `write_adapter`."""
    return write_adapter(folder, trained_adapter(**trained))


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
    # Factors go to the device before they are multiplied: they are far smaller than their product.
    there = {name: part.to(base.device) for name, part in delta.items()}
    return base + join(layout, whole(there)).float()


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write a weights file; returns its sha256. A full disk is an OSError, as everywhere."""
    data = save_bytes(tensors)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # on disk before the rename makes it visible
    return _sha256(data)


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
    check_meta(meta, path)
    return meta


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
        part = bool(_PART.fullmatch(name)) and tensor.dtype == torch.float16
        if tensor.ndim != 2 or not (part or name == TOKEN_ROWS):
            raise InputError(f"{path}: tensor {name!r} does not belong in an adapter.")
    if TOKEN_ROWS not in tensors:
        raise InputError(f"{path}: {TOKEN_ROWS} is missing; fetch the adapter again.")
    return tensors, found
