"""Models by hub id, from a small server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "a" * 40
FILES = {
    "org/whole": {
        "model_index.json": b"{}",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": b"weights" * 1000,
        "unet/diffusion_pytorch_model.fp16.safetensors": b"w" * 10,
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "sd_turbo.safetensors": b"a copy of all",
    },
    "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
}


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        data = self._content(repo, parts[4:] if api else parts[2:], api)
        error = "" if data is not None else "RepoNotFound"
        if repo == "org/gated":
            data, error = None, "GatedRepo"
        elif "no-such-revision" in parts:
            data, error = None, "RevisionNotFound"
        data = data or b""
        self.send_response({"": 200, "GatedRepo": 403}.get(error, 404))
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _content(self, repo: str, rest: list[str], api: bool) -> bytes | None:
        files = FILES.get(repo)
        if files is None:
            return None
        if not api:
            return files["/".join(rest[2:])]  # resolve/<commit>/<path>
        if rest[0] == "tree":
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                for name, data in files.items()
            ]
            return json.dumps(listed).encode()
        siblings = [{"rfilename": name} for name in files]
        return json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_hub_ids_resolve_to_what_loading_needs_or_to_one_sentence(hub: str, tmp_path: Path) -> None:
    """One fresh process: the hub's client reads its settings when it is imported."""
    script = (
        "import json, sys\n"
        "from components.ingest.store import resolve_model\n"
        "for ref in sys.argv[1:]:\n"
        "    try:\n"
        "        print(json.dumps([str(resolve_model(ref)), 0]))\n"
        "    except Exception as error:\n"
        "        print(json.dumps([str(error), getattr(error, 'exit_code', str(type(error)))]))\n"
    )
    refs = ["org/whole", "org/whole@main", "org/pickled", "org/unknown", "org/gated"]
    refs.append("org/whole@no-such-revision")
    settings = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, *refs],
        env={**os.environ, **settings, "HF_HUB_DISABLE_XET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole, pinned, pickled, unknown, gated, revision = map(json.loads, done.stdout.splitlines())
    assert whole[1] == 0 and pinned == whole
    folder = Path(whole[0])
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert files == {"model_index.json", "unet/config.json", weights}
    assert (folder / weights).read_bytes() == FILES["org/whole"][weights]
    assert pickled == [
        "org/pickled has no .safetensors weights: name a revision or copy that has",
        2,
    ]
    assert unknown[1] == 2 and "the hub has no model org/unknown" in unknown[0]
    assert gated[1] == 2 and "org/gated is gated on the hub: accept its terms" in gated[0]
    assert revision[1] == 2 and "org/whole has no revision no-such-revision" in revision[0]
