"""The demonstration's client: it knows the endpoint by its URL alone."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.ingest.store import resolve_model
from components.spec import RunSpec
from model.errors import EchoDistillError, InputError, ServiceError
from pipeline.progress import Event, Progress
from pipeline.run import ConceptResult
from pipeline.tracking import tracking_uri

TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Answer:
    """One picture that the endpoint drew. `milliseconds` from request to answer, over HTTP."""

    concept: str
    version: str
    sha256: str
    prompt: str
    seed: int
    path: Path
    milliseconds: float


def ask_endpoint(
    results: Sequence[ConceptResult],
    spec: RunSpec,
    prompts: Sequence[str],
    folder: Path,
    progress: Progress,
) -> dict[str, list[Answer]]:
    """Serve the registry in the Ray of this process and ask for every concept under every prompt.

    Prompts hold `{}` for the class noun. Returns answers by concept id, in the prompts' order.

    Raises:
        InputError: when the endpoint refuses a prompt.
        ServiceError: when the endpoint does not start or answer.
        EchoDistillError: when it answers with another version than the one that was registered.
    """
    from serve.endpoint import start
    from serve.settings import POCKET, load_settings

    given: dict[str, Any] = {"port": 0, "tracking_uri": tracking_uri(spec=spec)}
    if spec.base.name != POCKET:
        given |= {"base": spec.base.name, "student": resolve_model(spec.base.student)}
    given["access_log"] = folder.parent / "access.jsonl"
    progress(Event("serve", "", "start the endpoint"))
    endpoint = start(load_settings(**given))
    try:
        progress(Event("serve", endpoint.url, "drew its first picture"))
        answers: dict[str, list[Answer]] = {}
        total = len(results) * len(prompts)
        for result in results:
            answers[result.id] = []
            for seed, prompt in enumerate(prompts):
                answer = _ask(endpoint.url, result, prompt, seed, folder / result.id)
                answers[result.id].append(answer)
                done = sum(map(len, answers.values()))
                said = f"{result.id}: {answer.prompt} ({answer.milliseconds:.0f} ms)"
                progress(Event("ask", "", said, done, total))
        return answers
    finally:
        endpoint.stop()


def _ask(url: str, result: ConceptResult, prompt: str, seed: int, folder: Path) -> Answer:
    assert result.concept is not None
    # The version that this run made or found: a champion of other settings may reign.
    body = {
        "model": f"{result.id}@{result.version}",
        "prompt": prompt.replace("{}", result.concept.class_noun),
        "seed": seed,
        "response_format": "b64_json",
    }
    start = time.perf_counter()
    answer = _post(f"{url}/v1/images/generations", body)
    milliseconds = 1000 * (time.perf_counter() - start)
    if answer["adapter_sha256"] != result.sha256:
        raise EchoDistillError(
            f"the endpoint drew {result.id} with adapter {answer['adapter_sha256']}, not with "
            f"{result.sha256}"
        )
    path = folder / f"endpoint-{seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    return Answer(
        result.id,
        str(answer["version"]),
        answer["adapter_sha256"],
        answer["data"][0]["revised_prompt"],
        seed,
        path,
        milliseconds,
    )


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        said = error.read().decode("utf-8", "replace")[:300]
        kind = InputError if error.code == 400 else ServiceError  # 400: what was asked is wrong
        raise kind(f"the endpoint at {url} answered {error.code}: {said}") from error
    except (urllib.error.URLError, OSError) as error:
        raise ServiceError(f"the endpoint at {url} did not answer: {error}") from error
