"""The state of a concept in training, as a folder that can go on anywhere.

One concept is one folder of safetensors files and a manifest with the sha256 of each, so that it
can go on in another pack, world size or ZeRO stage. The manifest is written last and names every
file: a folder without it, or with a file that is not what it says, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from components.train.job import MANIFEST
from model.errors import InputError

if TYPE_CHECKING:  # the networks' libraries take seconds
    from components.train.engines import State

SCHEMA_VERSION = 1
GROUPS = ("teacher", "student", "heads")
ECHO = "echo"


@dataclass
class ConceptState:
    """Everything that a concept needs to go on.

    Attributes:
        concept_id: the concept's id.
        digest: of concept, spec and base, as `concept_digest` gives it; a state goes on only
            under the digest that it was made under.
        iteration: iterations done, counted over all stages.
        groups: the concept's slices of the teacher's, student's and heads' engine states.
        echo_images: student samples that joined the references, uint8 [E, 3, S, S].
        echo_prompts: the prompts that they were drawn from.
        seconds: training time that it took so far, its share of its packs'.
        losses: last losses by name.
        gpu_seconds: its share of the GPUs' time; 0 on CPUs.

    """

    concept_id: str
    digest: str
    iteration: int
    groups: dict[str, State]
    echo_images: torch.Tensor | None = None
    echo_prompts: tuple[str, ...] = ()
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    gpu_seconds: float = 0.0


def write_state(folder: Path, state: ConceptState) -> None:
    """Write a state into a folder that must not exist yet; it is whole once the manifest is there.

    Args:
        folder: of the one concept; its parent is made.
        state: what to write.

    """
    work = folder.with_name(f".part-{folder.name}-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        tensors = {name: state.groups[name] for name in GROUPS}
        if state.echo_images is not None:
            tensors[ECHO] = {"images": state.echo_images}
        files = {f"{name}.safetensors": _write(work, name, tensors[name]) for name in tensors}
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "concept": state.concept_id,
            "digest": state.digest,
            "iteration": state.iteration,
            "echo_prompts": list(state.echo_prompts),
            "seconds": state.seconds,
            "gpu_seconds": state.gpu_seconds,
            "losses": state.losses,
            "files": files,
        }
        manifest["sha256"] = _manifest_sha256(manifest)
        _write_bytes(work / MANIFEST, json.dumps(manifest, indent=1).encode())
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_state(folder: Path, digest: str | None = None) -> ConceptState:
    """Read a concept's state and verify every byte of it.

    Args:
        folder: of the one concept.
        digest: what the state must belong to; None takes any.

    Raises:
        InputError: when the state is not whole, was changed, or belongs to something else.

    """
    manifest = _read_manifest(folder)
    if digest is not None and manifest["digest"] != digest:
        raise InputError(
            f"the state {folder} belongs to other photos, settings or base than this run's: "
            "start the concept anew, or give the settings that it was made with"
        )
    tensors = {}
    for name, facts in manifest["files"].items():
        tensors[Path(name).stem] = _read(folder / name, str(facts["sha256"]))
    if not set(GROUPS) <= tensors.keys():
        raise _damaged(folder, "it lacks a file")
    return ConceptState(
        concept_id=manifest["concept"],
        digest=manifest["digest"],
        iteration=int(manifest["iteration"]),
        groups={name: tensors[name] for name in GROUPS},
        echo_images=tensors[ECHO]["images"] if ECHO in tensors else None,
        echo_prompts=tuple(manifest["echo_prompts"]),
        seconds=float(manifest["seconds"]),
        gpu_seconds=float(manifest.get("gpu_seconds", 0.0)),
        losses=dict(manifest["losses"]),
    )


def state_folders(root: Path) -> dict[str, Path]:
    """Find the folders of concept states below a checkpoint, whole or not, by concept id."""
    found = sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))
    return {path.name: path for path in found}


def newest(states: Sequence[ConceptState]) -> ConceptState:
    """Return the state with the most iterations done."""
    return max(states, key=lambda state: state.iteration)


def _write(folder: Path, name: str, tensors: State) -> dict[str, Any]:
    data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    _write_bytes(folder / f"{name}.safetensors", data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, sha256: str) -> State:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _damaged(path, "its content is not what the manifest says")
    try:
        return load(data)
    except SafetensorError as error:
        raise _damaged(path, f"it is not a safetensors file ({error})") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except OSError:
        raise _damaged(folder, f"it has no {MANIFEST}, so its writing was not finished") from None
    except ValueError:
        raise _damaged(path, "it is not JSON") from None
    needed = ("concept", "digest", "iteration", "echo_prompts", "seconds", "losses", "files")
    if not isinstance(manifest, dict) or any(key not in manifest for key in needed):
        raise _damaged(path, "it lacks a key")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise _damaged(path, f"its schema_version is not {SCHEMA_VERSION}")
    if manifest.get("sha256") != _manifest_sha256(manifest):
        raise _damaged(path, "its content is not what was written")
    files = manifest["files"]
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise _damaged(path, "its list of files is wrong")
    return manifest


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"the training state {path} is not whole: {reason}; go on from another one")
