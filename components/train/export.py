"""What a finished run leaves: adapter folders, and one line of facts a concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from components.spec import spec_digest
from components.train.job import BasePaths, total_iterations
from components.train.loop import Run
from components.train.members import Member
from components.train.preview import PREVIEW_PROMPTS
from components.train.tracking import png
from model.adapter import load_adapter, trained_adapter, write_adapter
from model.adapter_meta import PREVIEW_FILE, AdapterInfo
from model.errors import EchoDistillError
from model.rank_choice import with_rank
from model.sampler import draw


def export_adapters(run: Run, bases: BasePaths, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the adapter folder of every member that was trained to its end.

    Args:
        run: after `train_members`.
        bases: what to name as the origin of the base.
        folder: the adapters go to `<folder>/<concept id>`.

    Returns:
        the facts of `TrainedConcept`, by concept id. A member whose adapter can't be made is
        marked as failed.

    """
    facts = {}
    for member in run.members:
        sha256 = None
        if member.error is None:
            try:
                sha256 = _export(run, member, bases, folder / member.concept.id)
            except EchoDistillError as error:
                member.error = str(error)
        state = member.state
        facts[member.concept.id] = {
            "state": "failed" if member.error else "trained",
            "sha256": sha256,
            "digest": member.digest,
            "seconds": round(state.seconds, 3) if state else 0.0,
            "iterations": state.iteration if state else 0,
            "losses": state.losses if state else {},
            "error": member.error,
        }
    return facts


def _export(run: Run, member: Member, bases: BasePaths, folder: Path) -> str:
    spec, pair, concept, state = run.spec, run.frozen.pair, member.concept, member.state
    assert state is not None and state.iteration == total_iterations(spec)
    teacher, student = state.groups["teacher"], state.groups["student"]
    # A teacher's file has the adapter's token rows, so one with other rows is not kept.
    keeps = spec.train.keep_teacher and spec.method.shared_text
    info = AdapterInfo(
        concept_id=concept.id,
        class_noun=concept.class_noun,
        tokens=(concept.token,),
        initializer=concept.initializer,
        live=concept.live,
        base_name=bases.name,
        teacher_id=bases.teacher,
        student_id=bases.student,
        spec_digest=spec_digest(spec),
        concept_digest=member.digest,
        iterations=state.iteration,
    )
    trained = trained_adapter(
        pair=pair,
        info=info,
        student_kv=student["kv"],
        token_rows=student.get("rows", teacher["rows"]),
        teacher_kv=teacher["kv"] if keeps else None,
    )
    stored = with_rank(pair, trained, spec.adapter.rank, spec.adapter.max_picture_error)
    sha256 = write_adapter(folder, stored)
    adapter = load_adapter(folder, sha256)
    phrase = f"{concept.token} {concept.class_noun}"
    prompts = [prompt.format(phrase) for prompt in PREVIEW_PROMPTS]
    pictures = draw(pair, [adapter] * len(prompts), prompts, range(len(prompts)))
    (folder / PREVIEW_FILE).write_bytes(png(torch.cat(list(pictures), dim=2)))
    return sha256
