"""The run spec: one validated YAML that says everything about a training run.

A spec is put together from a preset (`components/presets/<name>.yaml`), a file and `--set
key=value` settings, each winning over the one before. Whatever is wrong is one sentence.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from model.errors import InputError
from model.settings import EchoSettings, LossSettings, MethodSettings, ViewSettings

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "pocket"
MAX_PACK = 256
AUTO_PACK = 16
AUTO_PACK_ON_CPU = 2  # more gain little there: the cores are busy
MAX_RANK = 1280  # no layer of Stable Diffusion 1 or 2 is wider


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BaseSpec(_Section):
    """The frozen models of a run; each is `pocket:<part>`, a path, an s3:// URI or a hub id.

    `image_projection` is an IP-Adapter safetensors file (path or s3:// URI), or None.
    """

    name: str = Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    teacher: str
    student: str
    identity: str
    backbones: tuple[str, ...] = Field(min_length=1, max_length=8)
    metric_clip: str
    metric_dino: str
    image_projection: str | None = None


class TrainSpec(_Section):
    """How a pack is trained. Workers, ZeRO stage and device do not change the result.

    `cooldown` is the last share of a network's steps over which its learning rates, constant until
    then, fall towards zero in a straight line.

    `items_at_once` splits a worker's items of a concept into passes of so many; None makes one
    pass. With one item a pass most of the round-off is the same whatever the number of workers.
    `checkpointing` computes activations again in the backward pass instead of keeping them: a fifth
    more operations, for GPUs with little memory. `channels_last` lays the convolutional networks
    out as a GPU's matrix units want them; auto: on a GPU, if compiled. `compile` has torch compile
    the frozen networks' blocks, anew for every pack size. `cuda_graphs` records their work of an
    iteration and replays it, so that a GPU waits for no launches; elsewhere it does nothing.
    `zero_stage` auto is 2 where several workers share what is trained, and 0 for one, which has
    nothing to share; at 3 they share the frozen networks' memory as well, and wait for each other's
    weights.
    """

    iterations: int = Field(default=1000, ge=1, le=1_000_000)
    teacher_lr: float = Field(default=1e-5, ge=0, le=1)
    token_lr: float = Field(default=1e-5, ge=0, le=1)
    student_lr: float = Field(default=1e-5, ge=0, le=1)
    head_lr: float = Field(default=1e-4, ge=0, le=1)
    scale_lr: bool = True
    cooldown: float = Field(default=0.0, ge=0, le=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(default=1e-2, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0, le=1e6)
    precision: Literal["float32", "bf16"] = "float32"
    zero_stage: Literal[0, 1, 2, 3, "auto"] = "auto"
    workers: int = Field(default=1, ge=1, le=1024)
    cpus_per_worker: int | None = Field(default=None, ge=1, le=1024)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_seconds: float = Field(default=600.0, ge=0)
    sample_every: int = Field(default=100, ge=0)
    max_failures: int = Field(default=2, ge=-1, le=1000)
    keep_teacher: bool = True
    items_at_once: int | None = Field(default=None, ge=1)
    checkpointing: bool = False
    channels_last: bool | Literal["auto"] = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    storage_path: str = "runs/train"

    @model_validator(mode="after")
    def _can_be_recorded(self) -> Self:
        if self.cuda_graphs and self.zero_stage == 3:
            raise ValueError(
                "cuda_graphs needs tensors that keep their place: zero_stage auto, 0, 1 or 2"
            )
        if self.compile and self.zero_stage == 3 and self.workers > 1:
            raise ValueError(
                "compile needs whole networks: zero_stage auto, 0, 1 or 2, or one worker"
            )
        if self.cuda_graphs and self.checkpointing:
            raise ValueError("cuda_graphs cannot record checkpointing: leave one of them off")
        return self


class AdapterSpec(_Section):
    """How an adapter is stored: in the rank `auto`, `full` or a number (`model/rank_choice.py`).

    `max_picture_error` bounds what `auto` may cost, in levels of 255: how far the test picture that
    changes most may be, on average over its values, from what the whole adapter draws. Half a level
    is what rounding to 8 bits costs at most.
    """

    rank: Literal["auto", "full"] | int = "auto"
    max_picture_error: float = Field(default=0.5, ge=0, le=255)

    @field_validator("rank", mode="before")
    @classmethod
    def _known_rank(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool)
        if value in ("auto", "full") or (number and 1 <= value <= MAX_RANK):
            return value
        raise ValueError(f"must be auto, full or a whole number from 1 to {MAX_RANK}")


class PackSpec(_Section):
    """How many concepts train together on one worker group.

    `auto` plans packs of `AUTO_PACK`, of which a worker trains as many at a time as its GPU's
    memory holds (on a CPU `AUTO_PACK_ON_CPU`), one group after the other.
    """

    size: Literal["auto"] | int = 4

    @field_validator("size", mode="before")
    @classmethod
    def _known_size(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool)
        if value == "auto" or (number and 1 <= value <= MAX_PACK):
            return value
        raise ValueError(f"must be auto or a whole number from 1 to {MAX_PACK}")

    @property
    def planned(self) -> int:
        """Give how many concepts one worker group is given."""
        return AUTO_PACK if self.size == "auto" else self.size


class TrackingSpec(_Section):
    """MLflow: `uri` None means `MLFLOW_TRACKING_URI`, else a SQLite file beside the runs."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = Field(default="echodistill", min_length=1)
    log_every: int = Field(default=10, ge=1)


class EvaluateSpec(_Section):
    """How many of the 25 prompts and how many seeds a prompt the metrics are measured on."""

    prompts: int = Field(default=25, ge=1, le=25)
    seeds: int = Field(default=4, ge=1, le=64)


class GateSpec(_Section):
    """When a candidate may take the champion's place; None: no such limit."""

    min_clip_i: float | None = Field(default=None, ge=-1, le=1)
    min_dino: float | None = Field(default=None, ge=-1, le=1)
    min_clip_t: float | None = Field(default=None, ge=-1, le=1)
    max_drop: float = Field(default=0.02, ge=0, le=2)


class CostSpec(_Section):
    """What training costs: the price of one GPU for an hour, in any currency; None: not told."""

    gpu_hour: float | None = Field(default=None, ge=0)

    def of(self, gpu_seconds: float) -> float | None:
        """Return what so many seconds of one GPU cost, or None without a price."""
        return None if self.gpu_hour is None else gpu_seconds * self.gpu_hour / 3600


class RunSpec(_Section):
    """Everything about a run. `batch_size` is the global batch a concept, over all workers."""

    base: BaseSpec
    seed: int = Field(default=0, ge=0, lt=2**63)
    resolution: int = Field(default=512, ge=16, le=4096, multiple_of=8)
    batch_size: int = Field(default=2, ge=1, le=1024)
    train: TrainSpec = TrainSpec()
    adapter: AdapterSpec = AdapterSpec()
    method: MethodSettings = MethodSettings()
    loss: LossSettings = LossSettings()
    views: ViewSettings = ViewSettings()
    echo: EchoSettings = EchoSettings()
    pack: PackSpec = PackSpec()
    tracking: TrackingSpec = TrackingSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    gate: GateSpec = GateSpec()
    cost: CostSpec = CostSpec()

    @field_validator("base", mode="before")
    @classmethod
    def _named_base(cls, value: Any) -> Any:
        return _preset_values(value)["base"] if isinstance(value, str) else value


# What moves no weight: where and on what a run goes, and what is done with its result.
_NO_EFFECT = ("pack", "tracking", "evaluate", "gate", "cost")
# What the models hold counts (`base_hash`), not where they lie; two only measure.
_NO_EFFECT_BASE = (
    "teacher",
    "student",
    "identity",
    "backbones",
    "image_projection",
    "metric_clip",
    "metric_dino",
)
_NO_EFFECT_TRAIN = (
    "zero_stage",
    "workers",
    "cpus_per_worker",
    "device",
    "checkpoint_seconds",
    "sample_every",
    "max_failures",
    "keep_teacher",
    "items_at_once",
    "checkpointing",
    "channels_last",
    "compile",
    "cuda_graphs",
    "storage_path",
)


def resolve_spec(
    preset: str | None = None,
    file: str | Path | None = None,
    sets: Sequence[str] = (),
) -> RunSpec:
    """Put a run spec together and check all of it.

    Args:
        preset: name of a shipped preset; None takes the file's `preset:` or else "pocket".
        file: a YAML file whose keys win over the preset's.
        sets: `a.b=value` settings, the value as in YAML, which win over both.

    Raises:
        InputError: one sentence naming the first wrong key, where it stands and, for an unknown
            one, the nearest right key.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if file is not None:
        values = _read_yaml(Path(file))
        named = values.pop("preset", None)
        preset = preset or named
        layers.append((str(file), values))
    name = DEFAULT_PRESET if preset is None else preset
    layers.insert(0, (f"preset {name}", _preset_values(name)))
    layers += [(f"--set {text}", _parse_set(text)) for text in sets]
    return _validated(layers)


def with_settings(spec: RunSpec, sets: Sequence[str]) -> RunSpec:
    """Return a spec with some `a.b=value` settings in place of its own.

    Raises:
        InputError: as `resolve_spec`.
    """
    layers: list[tuple[str, dict[str, Any]]] = [("the run spec", spec.model_dump(mode="json"))]
    return _validated([*layers, *((f"--set {text}", _parse_set(text)) for text in sets)])


def _validated(layers: Sequence[tuple[str, dict[str, Any]]]) -> RunSpec:
    merged: dict[str, Any] = {}
    for _, values in layers:
        merged = _merge(merged, values)
    try:
        return RunSpec.model_validate(merged)
    except ValidationError as error:
        raise InputError(_sentence(error.errors()[0], layers)) from None


def spec_digest(spec: RunSpec) -> str:
    """Return the sha256 (hex) over the fields that change the trained weights, and no others.

    A field at its class's default leaves no trace, so that a version of this project with one more
    setting still knows what was trained before. When a default changes, METHOD_VERSION is raised.
    """
    values = spec.model_dump(mode="json", exclude=set(_NO_EFFECT), exclude_defaults=True)
    for name in _NO_EFFECT_TRAIN:
        values.get("train", {}).pop(name, None)
    for name in _NO_EFFECT_BASE:
        values["base"].pop(name, None)
    values = {name: value for name, value in values.items() if value != {}}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def spec_yaml(spec: RunSpec) -> str:
    """Return the resolved spec as YAML that `resolve_spec` reads back to an equal one."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)


def preset_names() -> list[str]:
    """Return the names of the shipped presets, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _preset_values(name: Any) -> dict[str, Any]:
    if not isinstance(name, str) or name not in preset_names():
        near = difflib.get_close_matches(str(name), preset_names(), 1, 0.0)[0]
        known = ", ".join(preset_names())
        raise InputError(f"there is no preset {name!r}: did you mean {near!r} (known: {known})?")
    return _read_yaml(PRESETS / f"{name}.yaml")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the run spec {path} cannot be read ({error.strerror}): check the path"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"the run spec {path} is not UTF-8 text: save it as such") from None
    except yaml.YAMLError as error:
        raise InputError(f"the run spec {path} is not YAML: {_yaml_problem(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"the run spec {path} must be a mapping of keys to values")
    return values


def _parse_set(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set {text!r} must have the form key=value, like train.iterations=100")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(
            f"the value of --set {text!r} is not YAML: {_yaml_problem(error)}"
        ) from None
    for part in reversed(parts):
        parsed = {part: parsed}
    return parsed


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _sentence(error: ErrorDetails, layers: Sequence[tuple[str, dict[str, Any]]]) -> str:
    parts = [str(part) for part in error["loc"]]
    key = ".".join(parts)
    where = _where(parts, layers)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key!r} in {where}: did you mean {_nearest(key)}?"
    if error["type"] in ("missing", "missing_argument"):
        return f"the key {key!r} is missing from the run spec: give it, for example with --set"
    reason = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    field = reason.partition(" ")[0]
    if isinstance(value, dict) and field in value:  # a section's own check names its field first
        key, value, where = f"{key}.{field}", value[field], _where([*parts, field], layers)
    return f"{key} = {value!r} in {where} is wrong: {reason[:1].lower() + reason[1:]}"


def _where(parts: Sequence[str], layers: Sequence[tuple[str, dict[str, Any]]]) -> str:
    best, found = -1, "the run spec"
    for name, values in layers:
        depth, node = 0, values
        while depth < len(parts) and isinstance(node, dict) and parts[depth] in node:
            node = node[parts[depth]]
            depth += 1
        if depth and depth >= best:
            best, found = depth, name
    return found


def _nearest(key: str) -> str:
    """Return the keys of which a wrong one is a part (`train.lr`), or the one most like it."""
    section, _, last = key.rpartition(".")
    known_keys = list(_known_keys(RunSpec))
    parts = [
        known
        for known in known_keys
        if last in known.rpartition(".")[2].split("_")
        and (not section or known.rpartition(".")[0] == section)
    ]
    if parts:
        first, last_one = ", ".join(map(repr, parts[:-1])), repr(parts[-1])
        return f"{first} or {last_one}" if first else last_one

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, key, known).ratio()
        name = difflib.SequenceMatcher(None, last, known.rpartition(".")[2]).ratio()
        return max(whole, 0.99 * name)

    level = [known for known in known_keys if known.count(".") >= key.count(".")]
    return repr(max(level or known_keys, key=likeness))


def _known_keys(section: Any, prefix: str = "") -> Iterator[str]:
    if is_dataclass(section):
        yield from (prefix + field.name for field in fields(section))
        return
    for name, field in section.model_fields.items():
        kind = field.annotation
        yield prefix + name
        if isinstance(kind, type) and (is_dataclass(kind) or issubclass(kind, BaseModel)):
            yield from _known_keys(kind, f"{prefix}{name}.")


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Say where YAML is broken and how, without the excerpt."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())
