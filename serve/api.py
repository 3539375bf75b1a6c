"""What goes over the wire: requests, answers and errors in the shape of the OpenAI Images API."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from model.names import CHAMPION, CONCEPT_ID

ALIAS_OR_VERSION = re.compile(r"[A-Za-z0-9_-]{1,63}")
# Seeds travel through JSON, where a whole number is exact up to here.
LARGEST_SEED = 2**53 - 1

OutputFormat = Literal["png", "jpeg", "webp"]


class ApiError(Exception):
    """A refusal that a client sees: an HTTP status and an OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross from process to process whole: keyword arguments included."""
        return (_rebuild, (self.status, self.message, self.__dict__))

    def body(self) -> dict[str, Any]:
        """The OpenAI error object."""
        detail = ErrorDetail(message=self.message, type=self.kind, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()

    def headers(self) -> dict[str, str]:
        """Headers that go with the error."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def _rebuild(status: int, message: str, state: dict[str, Any]) -> ApiError:
    error = ApiError(status, message)
    error.__dict__.update(state)
    return error


def server_error(message: str, status: int = 500) -> ApiError:
    """An error of ours: nothing that the client can change."""
    return ApiError(status, message, kind="server_error", code="internal_error")


def busy(message: str, *, status: int, retry_after: int) -> ApiError:
    """A refusal that is worth trying again: 429 the queue is full, 503 nobody can draw now."""
    kind = "rate_limit_error" if status == 429 else "service_unavailable_error"
    code = "queue_full" if status == 429 else "unavailable"
    return ApiError(status, message, kind=kind, code=code, retry_after=retry_after)


class ImageRequest(BaseModel):
    """Body of `POST /v1/images/generations`; fields as in the OpenAI API, plus seed and steps."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1)]
    model: Annotated[str, Field(min_length=1, max_length=160)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: Annotated[str, Field(max_length=32)] | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: OutputFormat | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    num_inference_steps: Literal[1, 2, 4] | None = None

    @field_validator("num_inference_steps", mode="before")
    @classmethod
    def _whole_number(cls, value: Any) -> Any:
        # True and 1.0 equal 1, so a literal takes them.
        if value is not None and type(value) is not int:
            raise ValueError("it must be 1, 2 or 4")
        return value


class ImageDatum(BaseModel):
    """One picture of an answer."""

    b64_json: str
    revised_prompt: str
    seed: int


class ImageResponse(BaseModel):
    """Answer of `POST /v1/images/generations`; the base alone has no concept, version or sha256."""

    created: int
    data: list[ImageDatum]
    output_format: OutputFormat
    size: str
    model: str
    base: str
    concept: str | None
    version: str | None
    adapter_sha256: str | None
    num_inference_steps: int
    timing_ms: dict[str, float]


class ModelCard(BaseModel):
    """One entry of `GET /v1/models`; `version` is the champion's, and the base has none."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    version: str | None = None


class ModelList(BaseModel):
    """Answer of `GET /v1/models`: a page; with `has_more`, the next begins `after` its last id."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    has_more: bool = False


class VersionCard(BaseModel):
    """One registered version of a concept."""

    version: str
    adapter_sha256: str
    created: int
    aliases: list[str]
    metrics: dict[str, float]


class ConceptCard(BaseModel):
    """Answer of `GET /v1/concepts/{id}`; `versions` begins with the newest."""

    id: str
    object: Literal["concept"] = "concept"
    class_noun: str
    token: str
    base: str
    size: str
    champion: str | None
    versions: list[VersionCard]


class ErrorDetail(BaseModel):
    """What is wrong, in OpenAI's four fields."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail


@dataclass(frozen=True)
class ModelRef:
    """What a request's `model` names: the base (`concept` is None), or a concept's version."""

    concept: str | None
    pointer: str = CHAMPION


def parse_model(name: str | None, base: str) -> ModelRef:
    """Reads `<concept>`, `<concept>@<alias or version>` or the base's name (also None).

    The base's name always means the base: a concept cannot take it. ApiError 404 otherwise.
    """
    if name is None or name == base:
        return ModelRef(None)
    concept, at, pointer = name.partition("@")
    if concept == base:
        raise unknown_model(name, f"the base '{base}' has no versions: leave out '@...'")
    if not CONCEPT_ID.fullmatch(concept):
        raise unknown_model(name, "a concept's id has a-z, 0-9, '_' and '-' only")
    if not at:
        return ModelRef(concept)
    if not ALIAS_OR_VERSION.fullmatch(pointer):
        raise unknown_model(name, "after '@' goes a version's number or an alias")
    return ModelRef(concept, pointer)


def no_version(ref: ModelRef) -> ApiError:
    """404 for a concept's version that is not there, or that the key may not know of."""
    if ref.pointer == CHAMPION:
        return unknown_model(str(ref.concept), "no concept of this name has a champion")
    return unknown_model(f"{ref.concept}@{ref.pointer}", "no such version is registered")


def unknown_model(name: str, why: str) -> ApiError:
    """404 in OpenAI's words."""
    message = f"The model '{printable(name)}' does not exist: {why}."
    return ApiError(404, message, code="model_not_found", param="model")


def printable(text: str, longest: int = 80) -> str:
    """A client's own text, cut and made safe to send back (JSON allows half a character)."""
    safe = text.encode("utf-8", "backslashreplace").decode()
    return safe if len(safe) <= longest else safe[:longest] + "..."


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors as an OpenAI error; never repeats the input's value."""
    first = errors[0]
    # FastAPI puts the place ("body") before the field.
    location = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = printable(location[0]) if location else None
    kind = first["type"]
    if kind == "extra_forbidden":
        return ApiError(
            400, f"Unknown parameter: '{param}'.", code="unknown_parameter", param=param
        )
    if kind == "missing" and param:
        message = f"Missing required parameter: '{param}'."
        return ApiError(400, message, code="missing_required_parameter", param=param)
    if kind == "json_invalid":
        return ApiError(400, "The request's body is not valid JSON.", code="invalid_json")
    if param is None:
        message = "The request's body must be a JSON object with content type application/json."
        return ApiError(400, message, code="invalid_body")
    if param == "response_format":
        reason = "Only 'b64_json' is offered: pictures are in the answer, never behind a link"
    else:
        reason = str(first["msg"]).removeprefix("Value error, ")
    message = f"Invalid value for '{param}': {reason}."
    return ApiError(400, message, code="invalid_value", param=param)
