"""Taking over what a run has trained, whose registrar died."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from components.train.finished import finished
from components.train.job import ADAPTERS, RESULTS
from model.errors import ServiceError


def test_what_is_trained_under_the_digest_is_taken_over_unless_the_disk_is_full(
    tmp_path: Path,
) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    facts = {}
    for name in ("fox", "mug", "owl"):
        folder = checkpoint / ADAPTERS / name
        folder.mkdir(parents=True)
        (folder / "adapter.safetensors").write_bytes(name.encode() * 4096)
        facts[name] = {"state": "trained", "digest": f"digest of {name}"}
    facts["owl"]["state"] = "failed"
    (checkpoint / RESULTS).write_text(json.dumps(facts))
    wanted = {"fox": "digest of fox", "mug": "of other photos", "owl": "digest of owl"}

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ServiceError, match=r"no space left on the disk while writing .*out"):
            finished(str(checkpoint), wanted, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in out.rglob("*") if path.is_file()]

    (made,) = finished(str(checkpoint), wanted, out).values()
    assert made.id == "fox" and made.adapter_dir == out / "fox"
    assert (out / "fox" / "adapter.safetensors").read_bytes() == b"fox" * 4096
