"""The Kubeflow pipeline: ingest -> train -> register -> evaluate -> gate and promote.

The steps hand each other the URI of a batch, and what they know of its concepts is in the batch's
documents: so one pipeline serves one concept and ten thousand, a step that is started again does
what is left, and `echodistill status` shows a pipeline's batch as any other.

Nothing is cached by Kubeflow. Its key is the text of a step's inputs, which says nothing of the
photos behind a prefix or of what the registry has; each step finds out itself, by digest, what is
done already, and an unchanged batch costs seconds. `evaluate` is one step over all concepts rather
than a loop of steps: the networks that draw and measure are loaded once, where a loop would load
gigabytes a concept, and thousands of concepts would be thousands of pods.
"""

# No postponed annotations here: kfp reads those of the pipeline as they stand.
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp import compiler, dsl, kubernetes

from components.evaluate.component import evaluate
from components.ingest.component import ingest
from components.promote.component import promote
from components.register.component import register
from components.report.component import report
from components.spec import RunSpec
from components.train.component import train
from components.train.rayjob import rayjob_of
from model.errors import InputError

NAME = "echodistill"
# What infra/ names: the environment of everything that is ours.
CONFIG_MAP = "echodistill"
CONFIG = (
    *("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "MLFLOW_TRACKING_URI", "ECHODISTILL_STORAGE"),
    *("ECHODISTILL_CACHE", "HF_HOME", "HOME", "MLFLOW_DISABLE_TELEMETRY"),
)
CACHE, CACHE_SIZE = "/var/cache/echodistill", "60Gi"
SECRETS: Mapping[str, tuple[str, ...]] = {
    # Both may be missing: a cloud's role on the service account, an MLflow without passwords.
    "echodistill-s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "echodistill-mlflow": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
}
USER = 10001  # of the images
RETRIES, BACKOFF, LONGEST_BACKOFF = 3, "60s", "900s"


@dataclass(frozen=True)
class Size:
    """What a step's pod asks for and may use; `hours` after which it is ended."""

    cpu: str
    memory: str
    most_cpu: str
    most_memory: str
    hours: float
    gpu: bool = False


SMALL = Size("500m", "1Gi", "2", "4Gi", hours=1)
INGEST = Size("1", "2Gi", "4", "8Gi", hours=6)  # reads every photo
WATCH = Size("250m", "1Gi", "1", "2Gi", hours=96)  # longer than the RayJob may take
TRAIN_HERE = Size("4", "32Gi", "12", "96Gi", hours=96, gpu=True)
REGISTER = Size("1", "4Gi", "2", "8Gi", hours=12)
EVALUATE = Size("2", "16Gi", "8", "32Gi", hours=24, gpu=True)


@dataclass(frozen=True)
class Settings:
    """What a pipeline is compiled with.

    Attributes:
        spec: the run spec that it has unless a run says otherwise.
        backend: `rayjob` or `local`.
        rayjob: the RayJob (`read_rayjob`), for that backend.
        image: of the steps; by default the RayJob's head's.
        namespace: of the RayJob; by default that of the steps.
        storage: where batches are; by default beside the photos.
        run: names the pipeline run; by default Kubeflow's id of it.
        in_cluster: whether the steps are pods, with resources, secrets and retries.
    """

    spec: RunSpec
    backend: str = "rayjob"
    rayjob: str = ""
    image: str = ""
    namespace: str = ""
    storage: str = ""
    run: str = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    in_cluster: bool = True


def build(settings: Settings) -> Any:
    """Return the pipeline, a kfp component.

    Raises:
        InputError: when the RayJob manifest is wrong.
    """
    image = settings.image or (_image_of(settings.rayjob) if settings.rayjob else "")
    uses_gpu = settings.spec.train.device != "cpu"

    def sized(task: Any, size: Size) -> Any:
        task.set_caching_options(enable_caching=False)
        if settings.in_cluster:
            _as_pod(task, size, uses_gpu, image)
        return task

    @dsl.pipeline(name=NAME, description="Photos of concepts in, one-step adapters served")
    def echodistill(
        prefix: str,
        spec: str = one_line(settings.spec),
        storage: str = settings.storage,
        backend: str = settings.backend,
        rayjob: str = settings.rayjob,
        namespace: str = settings.namespace,
    ) -> None:
        told = report(
            prefix=prefix,
            spec=spec,
            storage=storage,
            run=settings.run,
            backend=backend,
            namespace=namespace,
        )
        sized(told, SMALL)
        with dsl.ExitHandler(told, name="steps"):
            planned = ingest(prefix=prefix, spec=spec, storage=storage, run=settings.run)
            sized(planned, INGEST)
            trained = train(
                batch=planned.outputs["batch"],
                backend=backend,
                rayjob=rayjob,
                namespace=namespace,
                run=settings.run,
            )
            sized(trained, TRAIN_HERE if settings.backend == "local" else WATCH)
            registered = sized(register(batch=trained.outputs["batch"]), REGISTER)
            measured = sized(evaluate(batch=registered.outputs["batch"]), EVALUATE)
            sized(promote(batch=measured.outputs["batch"]), SMALL)

    return echodistill


def compile_to(settings: Settings, file: Path) -> None:
    """Write the pipeline as YAML that Kubeflow takes, with what kfp-kubernetes adds.

    Raises:
        InputError: when the manifest is wrong, or the file's name is not one of YAML.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise InputError(f"{file} is no name of a YAML file: end it in .yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(build(settings), str(file))


def read_rayjob(path: Path) -> str:
    """Read a manifest's RayJob and check that a batch can be put into it; returns it in one line.

    Raises:
        InputError: when it is missing or is no such manifest.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"the RayJob manifest {path} can't be read ({reason}): name it with --rayjob"
        ) from None
    return json.dumps(rayjob_of(text))


def one_line(spec: RunSpec) -> str:
    """Return a run spec as JSON, which is YAML in one line.

    kfp writes defaults into the comment at a compiled file's head, where a second line is none.
    """
    return json.dumps(spec.model_dump(mode="json"))


def _image_of(rayjob: str) -> str:
    """Return the image of a RayJob's head, which the steps run in too."""
    try:
        head = rayjob_of(rayjob)["spec"]["rayClusterSpec"]["headGroupSpec"]
        return str(head["template"]["spec"]["containers"][0]["image"])
    except (KeyError, IndexError, TypeError):
        raise InputError(
            "the RayJob names no image of its head: give the steps' with --image"
        ) from None


def _as_pod(task: Any, size: Size, uses_gpu: bool, image: str) -> None:
    """Say what a step's pod needs: room, time, secrets, another try."""
    if image:
        task.set_container_image(image)
    task.set_cpu_request(size.cpu).set_cpu_limit(size.most_cpu)
    task.set_memory_request(size.memory).set_memory_limit(size.most_memory)
    task.set_retry(RETRIES, BACKOFF, 2.0, LONGEST_BACKOFF)
    if size.gpu and uses_gpu:
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(1)
        kubernetes.add_toleration(
            task, key="nvidia.com/gpu", operator="Exists", effect="NoSchedule"
        )
    kubernetes.set_timeout(task, round(size.hours * 3600))
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.empty_dir_mount(task, "cache", CACHE, size_limit=CACHE_SIZE)
    for secret, keys in SECRETS.items():
        kubernetes.use_secret_as_env(task, secret, {key: key for key in keys}, optional=True)
    kubernetes.use_config_map_as_env(task, CONFIG_MAP, {key: key for key in CONFIG}, optional=True)
