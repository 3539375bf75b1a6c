"""Every setting of the endpoint, in one validated model.

Values come from arguments, then from the environment (`ECHODISTILL_SERVE_<NAME>`), then from the
defaults below. The whole object may be logged: keys are kept out of its representation.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.errors import InputError

POCKET = "pocket"


def _cache_root() -> Path:
    fallback = Path("~/.cache/echodistill").expanduser()
    return Path(os.environ.get("ECHODISTILL_CACHE") or fallback)


def _tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


class ServeSettings(BaseSettings):
    """Settings of the endpoint.

    The base is the shipped pair (`base="pocket"`), or `base` is the name that clients use for the
    student in the local diffusers directory `student`; drawing needs no teacher.
    """

    model_config = SettingsConfigDict(
        env_prefix="ECHODISTILL_SERVE_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    # What draws
    base: str = Field(default=POCKET, pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")
    student: Path | None = None
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    speed: Literal["eager", "graphs", "compile"] = Field(
        default="eager",
        description="how networks run on a GPU; `graphs` and `compile` (fastest; minutes at the "
        "start for each padded size up to `max_batch`) are for GPUs alone: see serve/fast.py",
    )
    channels_last: bool = Field(
        default=False, description="lay convolutions out as NHWC; `compile` does so anyway"
    )
    tiny_decoder: Path | None = Field(
        default=None, description="directory of an AutoencoderTiny that decodes faster, less well"
    )
    safety_checker: str = Field(
        default="",
        pattern=r"^([A-Za-z_][\w.]*:[A-Za-z_]\w*)?$",
        description="`module:function` that looks at every picture; see serve/safety.py",
    )

    # Where adapters come from
    tracking_uri: str = Field(default_factory=_tracking_uri)
    cache: Path = Field(default_factory=_cache_root)
    alias_seconds: float = Field(default=2.0, gt=0, description="how long an alias is believed")
    registry_seconds: float = Field(
        default=5.0, gt=0, description="longest wait for a registry when an older answer is known"
    )
    adapter_bytes: int = Field(default=2 * 2**30, ge=0, description="adapters in memory")
    device_bytes: int = Field(default=4 * 2**30, ge=0, description="adapters on a GPU")
    prewarm: str = Field(
        default="",
        pattern=r"^(\*|[a-z0-9_,-]*)$",
        description="concepts to load before the first request, by comma; `*`: every champion",
    )
    cutover_seconds: float = Field(
        default=10.0,
        ge=0,
        description="how long a moved alias may draw with the version before, while the new loads",
    )
    keys_values_bytes: int = Field(default=2**30, ge=0, description="cached keys and values")

    # Where it listens, and to whom
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535, description="0 = any free port")
    api_keys: SecretStr = Field(
        default=SecretStr(""), repr=False, description="`name=key` or `name=sha256:hex`, by comma"
    )
    api_keys_file: Path | None = Field(
        default=None, description="one `name sha256:hex` a line; see serve/auth.py"
    )
    access_log: Path | None = Field(
        default=None, description="JSON lines; unset: standard error of the gateway"
    )

    traces: Literal["", "otlp", "console"] = Field(
        default="", description="OpenTelemetry spans of answers; OTEL_EXPORTER_OTLP_ENDPOINT: where"
    )

    # Limits
    max_n: int = Field(default=10, ge=1, le=64, description="pictures a request may ask for")
    max_prompt: int = Field(default=1000, ge=1, le=10_000, description="characters of a prompt")
    max_body: int = Field(default=64 * 2**10, ge=1024, description="bytes of a request")
    max_queue: int = Field(default=64, ge=1, description="pictures accepted and not yet answered")
    request_seconds: float = Field(default=120.0, gt=0, description="longest wait for an answer")

    # How it draws
    max_batch: int = Field(default=8, ge=1, le=256, description="pictures in one forward")
    batch_sizes: str = Field(
        default="",
        pattern=r"^([1-9]\d{0,2}(,[1-9]\d{0,2})*)?$",
        description="padded sizes to compile or capture before the first request, by comma; "
        "unset: steps up to `max_batch`. Fewer start sooner, and pad more",
    )
    batch_wait_seconds: float = Field(
        default=0.0, ge=0, description="a batch also fills while the one before is drawn"
    )
    encoders: int = Field(default=4, ge=1, le=64, description="threads that write picture files")
    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(
        default=None, ge=1, description="with more than `replicas`, Ray Serve scales between them"
    )
    scale_at: float = Field(
        default=16.0, gt=0, description="requests under way in a replica that call for another one"
    )
    drain_seconds: float = Field(
        default=20.0, ge=0, description="a replica that stops has so long to answer what it took"
    )
    replica_cpus: float = Field(default=1.0, ge=0)
    replica_gpus: float | None = Field(default=None, ge=0, description="default: 1 with CUDA")
    health_seconds: float = Field(default=10.0, gt=0, description="between health checks")
    ray_address: str = Field(default="local", description="`local` starts a Ray of its own")

    @field_validator("tracking_uri")
    @classmethod
    def _absolute_sqlite(cls, value: str) -> str:
        # Ray's workers start in folders of their own, so a relative file would be another file.
        prefix = "sqlite:///"
        if value.startswith(prefix) and not value.startswith(prefix + "/"):
            return prefix + str(Path(value.removeprefix(prefix)).resolve())
        return value

    @field_validator("cache", "student", "tiny_decoder", "api_keys_file", "access_log")
    @classmethod
    def _absolute_path(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().resolve()

    @model_validator(mode="after")
    def _whole_base(self) -> ServeSettings:
        if self.student is None and self.base != POCKET:
            raise ValueError(
                f"base '{self.base}' does not ship with the project: give the directory of its "
                f"student (`student`), or use base '{POCKET}'"
            )
        if self.student is not None and self.base == POCKET:
            raise ValueError(f"'{POCKET}' names the shipped pair: give yours another name (`base`)")
        if self.batch_sizes and max(self.padded_sizes) != self.max_batch:
            raise ValueError("the largest of `batch_sizes` must be `max_batch`")
        if self.max_n > self.max_queue:
            raise ValueError("`max_n` must not be over `max_queue`")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError("`max_replicas` must not be under `replicas`")
        return self

    @property
    def padded_sizes(self) -> tuple[int, ...]:
        """`batch_sizes` as numbers."""
        return tuple(sorted({int(part) for part in self.batch_sizes.split(",") if part}))

    @property
    def local_only(self) -> bool:
        """Whether only this machine can reach the endpoint."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_settings(**given: Any) -> ServeSettings:
    """Settings from arguments over environment over defaults.

    Raises InputError that names the first wrong setting, for people who typed it.
    """
    try:
        return ServeSettings(**given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        subject = f"endpoint setting '{name}' is wrong" if name else "endpoint settings are wrong"
        raise InputError(f"{subject}: {message}.") from None
