"""Adapters as versions of the registered model ``echodistill.<concept id>``."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.ingest.cache import disk_error
from components.register.connection import code_of, connect, experiment_id, reaching
from model.errors import EchoDistillError, InputError
from model.names import (
    ADAPTER_ARTIFACT,
    BASE_HASH_TAG,
    CANDIDATE,
    CHAMPION,
    CONCEPT_DIGEST_TAG,
    MEASURED,
    METRIC_TAG,
    MODEL_PREFIX,
    SHA256_TAG,
    SPEC_DIGEST_TAG,
)

if TYPE_CHECKING:  # torch takes seconds, and who only looks versions up needs none
    from components.ingest.concept_folder import Concept
    from model.adapter import Adapter

_MODEL_FILE = Path(__file__).parent / "pyfunc_model.py"
_PAGE = 1000  # the most that MLflow gives of models in one answer
_ONE_BY_ONE = 50  # concepts; more are asked for by their spec
_NEEDS = ("torch", "diffusers", "transformers", "safetensors", "pillow", "pandas", "mlflow")


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a concept in the registry, with its tags; ``version`` counts from 1."""

    name: str
    version: int
    sha256: str
    tags: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None

    @property
    def concept_id(self) -> str:
        """Return the concept's id."""
        return self.name.removeprefix(MODEL_PREFIX)

    @property
    def metrics(self) -> dict[str, float]:
        """Return the figures among the tags, by name."""
        found = {}
        for key, value in self.tags.items():
            if key.startswith(METRIC_TAG):
                found[key.removeprefix(METRIC_TAG)] = float(value)
        return found


def model_name(concept_id: str) -> str:
    """Return the name of a concept's registered model."""
    return MODEL_PREFIX + concept_id


def register_adapter(
    adapter_dir: Path,
    concept: Concept,
    *,
    tracking_uri: str,
    run_id: str | None = None,
    force: bool = False,
) -> RegisteredVersion:
    """Register an adapter folder as a version of its concept, with the alias ``candidate``.

    There is one version a concept digest: when one is there already, or another process is
    faster, that one is returned. ``force`` (of a concept that was trained anew on purpose)
    makes a new version in any case. The version appears with its artifacts and tags, or not
    at all.

    Raises InputError when the folder is not this concept's whole adapter, ServiceError when
    the MLflow server is out of reach.
    """
    from model.adapter import load_adapter

    adapter = load_adapter(adapter_dir)
    digest = _own_digest(adapter, concept, adapter_dir)
    client = connect(tracking_uri)
    with reaching(tracking_uri):
        name = _registered_model(client, concept)
        known = _versions_of_digest(client, name, digest)
        if force:  # then what this very run has made counts alone: its answer may have got lost
            known = [v for v in known if run_id and v.run_id == run_id]
        if known:
            kept = known[0]
        else:
            kept = _new_version(client, tracking_uri, name, adapter, Path(adapter_dir), run_id)
            kept = _keep_lowest(client, kept, digest, kept.run_id if force else None)
        set_alias(client, name, CANDIDATE, kept.version)
    return kept


def set_alias(client: Any, name: str, alias: str, version: int | str) -> None:
    """Point a model's alias to a version, whoever else points it somewhere meanwhile.

    Of two that make a new alias at once MLflow's database refuses one, as a bad request. Asked
    again it finds the alias there and moves it; what is wrong is refused again.
    """
    try:
        client.set_registered_model_alias(name, alias, str(version))
    except Exception as error:
        if code_of(error) != "BAD_REQUEST":
            raise
        client.set_registered_model_alias(name, alias, str(version))


def _own_digest(adapter: Adapter, concept: Concept, folder: Path) -> str:
    found = adapter.meta["concept"]["id"]
    if found != concept.id:
        raise InputError(f"{folder} is the adapter of {found!r}, not of {concept.id!r}")
    digest = str(adapter.meta.get("concept_digest", ""))
    if not digest:
        raise InputError(f"{folder}/adapter.json has no concept_digest: train the concept again")
    return digest


def _registered_model(client: Any, concept: Concept) -> str:
    """Return the name of the concept's registered model, made when it is missing."""
    name = model_name(concept.id)
    try:
        client.create_registered_model(
            name,
            tags={"class_noun": concept.class_noun, "token": concept.token},
            description=f"One-step adapters that draw {concept.token} {concept.class_noun}",
        )
    except Exception as error:
        if code_of(error) != "RESOURCE_ALREADY_EXISTS":
            raise
    return name


def _new_version(
    client: Any,
    tracking_uri: str,
    name: str,
    adapter: Adapter,
    folder: Path,
    run_id: str | None,
) -> RegisteredVersion:
    """Log the adapter as an MLflow model and make a version of it."""
    from mlflow.models import Model

    run_id = run_id or _registration_run(client, tracking_uri, adapter)
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment, name="adapter", source_run_id=run_id, model_type="pyfunc"
    )
    try:
        with tempfile.TemporaryDirectory(prefix="echodistill-register-") as scratch:
            model = Model(run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id)
            _save_pyfunc(model, adapter, folder, Path(scratch))
            client.log_model_artifacts(logged.model_id, str(Path(scratch) / "model"))
    except OSError as error:
        raise disk_error(error, f"the artifacts of {name}") from error
    client.finalize_logged_model(logged.model_id, "READY")
    tags = version_tags(adapter)
    # With SQLite a source `models:/<id>`, or no run, would be looked up at the global tracking
    # URI; over HTTP a source is accepted only as the artifacts of the model that is named.
    made = client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=run_id,
        tags=tags,
        model_id=logged.model_id,
    )
    return RegisteredVersion(name, int(made.version), adapter.sha256, tags, run_id)


def _registration_run(client: Any, tracking_uri: str, adapter: Adapter) -> str:
    """Make a run for an adapter that was trained without tracking: a version needs one."""
    concept_id = adapter.meta["concept"]["id"]
    run = client.create_run(experiment_id(client, tracking_uri), run_name=f"{concept_id}-register")
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def version_tags(adapter: Adapter) -> dict[str, str]:
    """Return the tags of an adapter's version."""
    meta = adapter.meta
    tags = {
        CONCEPT_DIGEST_TAG: str(meta["concept_digest"]),
        SPEC_DIGEST_TAG: str(meta.get("spec_digest", "")),
        BASE_HASH_TAG: str(meta["base"]["hash"]),
        SHA256_TAG: adapter.sha256,
        "base": str(meta["base"]["name"]),
        "concept": str(meta["concept"]["id"]),
        "class_noun": str(meta["concept"]["class_noun"]),
        "token": " ".join(adapter.tokens),
        "iterations": str(meta.get("iterations", "")),
    }
    for key, value in meta.get("metrics", {}).items():
        tags[METRIC_TAG + key] = repr(float(value))
    return tags


def _save_pyfunc(model: Any, adapter: Adapter, folder: Path, scratch: Path) -> None:
    """Write the MLflow model: this package's model file, the adapter folder, the signature."""
    import mlflow.pyfunc

    from model.adapter import load_adapter

    # MLflow names an artifact by its folder; what is copied is what was just verified.
    named = scratch / "adapter"
    shutil.copytree(folder, named, ignore=shutil.ignore_patterns(".*"))
    load_adapter(named, expected_sha256=adapter.sha256)
    meta = adapter.meta
    example = {"prompt": f"a photo of a {adapter.tokens[0]} {meta['concept']['class_noun']}"}
    mlflow.pyfunc.save_model(
        str(scratch / "model"),
        python_model=str(_MODEL_FILE),
        artifacts={"adapter": str(named)},
        signature=_signature(),
        input_example={**example, "seed": 0, "steps": 1},
        model_config={
            SHA256_TAG: adapter.sha256,
            "teacher": "",
            "student": "",
            "device": "cpu",
        },
        pip_requirements=_requirements(),
        metadata={"concept": meta["concept"]["id"], SHA256_TAG: adapter.sha256},
        mlflow_model=model,
    )


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    return ModelSignature(
        inputs=Schema(
            [
                ColSpec("string", "prompt"),
                ColSpec("long", "seed", required=False),
                ColSpec("long", "steps", required=False),
            ]
        ),
        outputs=Schema([ColSpec("binary", "image")]),
    )


def _requirements() -> list[str]:
    """Return pins of what drawing needs, without the build of torch of this machine."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in _NEEDS]


def _keep_lowest(
    client: Any, mine: RegisteredVersion, digest: str, run_id: str | None
) -> RegisteredVersion:
    """Return the lowest version of a digest (of a run); when that is not mine, mine is deleted.

    Numbers only grow, so whoever has a higher one sees the lower: all keep the same one.
    """
    every = _versions_of_digest(client, mine.name, digest)
    lowest = next(v for v in every if run_id is None or v.run_id == run_id)
    if lowest.version != mine.version:
        try:
            client.delete_model_version(mine.name, str(mine.version))
        except Exception as error:
            # It is gone: the answer to a first try got lost, and MLflow asked again by itself.
            if code_of(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
    return lowest


def _versions_of_digest(client: Any, name: str, digest: str) -> list[RegisteredVersion]:
    """Return a concept's versions with a digest, the lowest first."""
    return _versions_of(client, f"name = '{name}' and tags.{CONCEPT_DIGEST_TAG} = '{digest}'")


def _versions_of(client: Any, query: str) -> list[RegisteredVersion]:
    found: list[RegisteredVersion] = []
    token = None
    while True:
        page = client.search_model_versions(query, max_results=_PAGE, page_token=token)
        found += [_version(item) for item in page]
        token = page.token
        if not token:
            return sorted(found, key=lambda item: item.version)


def _version(item: Any) -> RegisteredVersion:
    tags = dict(item.tags)
    return RegisteredVersion(
        item.name, int(item.version), tags.get(SHA256_TAG, ""), tags, item.run_id or None
    )


def find_version_by_digest(
    concept_id: str, digest: str, *, tracking_uri: str
) -> RegisteredVersion | None:
    """Return the newest version of a concept with this digest, or None.

    Raises ServiceError when the MLflow server is out of reach.
    """
    client = connect(tracking_uri)
    with reaching(tracking_uri):
        found = _versions_of_digest(client, model_name(concept_id), digest)
    return found[-1] if found else None


def find_versions(
    digests: Mapping[str, str], spec_digest: str, *, tracking_uri: str
) -> dict[str, tuple[RegisteredVersion, int | None]]:
    """Return the newest version under each digest, with the number of its concept's champion.

    Args:
        digests: concept digests by concept id, all made with one run spec.
        spec_digest: of that spec; many concepts are asked for by it at once.
        tracking_uri: of the registry.

    Returns:
        what was found, by concept id; None for a champion that there is not.

    Raises ServiceError when the MLflow server is out of reach.
    """
    client = connect(tracking_uri)
    found: dict[str, tuple[RegisteredVersion, int | None]] = {}
    with reaching(tracking_uri):
        if len(digests) > _ONE_BY_ONE:
            versions = _versions_of(client, f"tags.{SPEC_DIGEST_TAG} = '{spec_digest}'")
            champions = _champions(client)
        else:
            names = [(model_name(name), digest) for name, digest in digests.items()]
            versions = [each for pair in names for each in _versions_of_digest(client, *pair)]
            champions = None
        for version in versions:  # the lowest first
            name = version.concept_id
            if digests.get(name) == version.tags.get(CONCEPT_DIGEST_TAG):
                found[name] = version, champions.get(name) if champions is not None else None
    if champions is None:
        for name, (version, _) in found.items():
            champion = get_version(name, CHAMPION, tracking_uri=tracking_uri)
            found[name] = version, champion.version if champion else None
    return found


def _champions(client: Any) -> dict[str, int]:
    """Return the number of every concept's champion, by concept id."""
    found: dict[str, int] = {}
    token = None
    while True:
        page = client.search_registered_models(
            f"name LIKE '{MODEL_PREFIX}%'", max_results=_PAGE, page_token=token
        )
        for model in page:
            if CHAMPION in model.aliases:
                found[model.name.removeprefix(MODEL_PREFIX)] = int(model.aliases[CHAMPION])
        token = page.token
        if not token:
            return found


def get_version(
    concept_id: str, pointer: str | int, *, tracking_uri: str
) -> RegisteredVersion | None:
    """Return the version that a number or alias of a concept points to, or None."""
    client = connect(tracking_uri)
    name = model_name(concept_id)
    with reaching(tracking_uri):
        try:
            if str(pointer).isdecimal():
                return _version(client.get_model_version(name, str(pointer)))
            return _version(client.get_model_version_by_alias(name, str(pointer)))
        except Exception as error:
            if code_of(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def set_metrics(
    version: RegisteredVersion, metrics: Mapping[str, float], *, tracking_uri: str
) -> RegisteredVersion:
    """Write figures to a version's tags and its run; returns the version with them.

    `MEASURED` comes last: one that has it has them all.
    """
    client = connect(tracking_uri)
    if version.run_id:
        with reaching(tracking_uri):
            for name, value in metrics.items():
                client.log_metric(version.run_id, f"eval.{name}", float(value))
    names = sorted(metrics, key=lambda name: name == MEASURED)
    tags = {METRIC_TAG + name: repr(float(metrics[name])) for name in names}
    set_tags(version, tags, tracking_uri=tracking_uri)
    return RegisteredVersion(
        version.name, version.version, version.sha256, {**version.tags, **tags}, version.run_id
    )


def set_tags(version: RegisteredVersion, tags: Mapping[str, str], *, tracking_uri: str) -> None:
    """Write tags of a version."""
    client = connect(tracking_uri)
    with reaching(tracking_uri):
        for key, value in tags.items():
            client.set_model_version_tag(version.name, str(version.version), key, value)


def fetch_adapter(version: RegisteredVersion, folder: Path, *, tracking_uri: str) -> Path:
    """Download a version's adapter folder below ``folder`` and verify it against its tag.

    Raises InputError when the adapter's sha256 is not the tag's, ServiceError when the
    server or its artifact store is out of reach.
    """
    from model.adapter import load_adapter

    client = connect(tracking_uri)
    with reaching(tracking_uri):
        from mlflow.artifacts import download_artifacts

        source = client.get_model_version_download_uri(version.name, str(version.version))
        place = Path(
            download_artifacts(
                artifact_uri=f"{source.rstrip('/')}/{ADAPTER_ARTIFACT}",
                dst_path=str(folder),
                tracking_uri=tracking_uri,
            )
        )
    try:
        load_adapter(place, expected_sha256=version.sha256)
    except EchoDistillError as error:
        shutil.rmtree(place, ignore_errors=True)
        raise InputError(
            f"version {version.version} of {version.name} is not what its tag {SHA256_TAG} says "
            f"({error}): register it again"
        ) from error
    return place
