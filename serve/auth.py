"""API keys: who may draw. Only sha256 digests are kept, in files and in memory.

A key is 32 random bytes, so a plain digest of it cannot be guessed back and needs no salt. The key
file has one `name sha256:<hex>` a line; `python -m serve.auth NAME` makes a key and its line. After
the digest may follow what the key is limited to: `concepts=a,team-*` `pictures_per_minute=60`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from model.errors import InputError
from serve.api import ApiError
from serve.limits import Limits, parse_limits
from serve.settings import ServeSettings

PREFIX = "sk-echodistill-"
SHORTEST_KEY = 20
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class ApiKeys:
    """Digests of the accepted keys by owner; with none of them everybody is let in."""

    owners: Mapping[str, str] = field(default_factory=dict, repr=False)  # digest -> name
    limits: Mapping[str, Limits] = field(default_factory=dict)  # by name, where there are any

    @property
    def required(self) -> bool:
        """Whether a request must carry a key."""
        return bool(self.owners)

    def owner(self, authorization: str | None) -> str | None:
        """Name of the key in an `Authorization: Bearer` header; None when none is required.

        Raises ApiError 401 for a key that is missing or not known.
        """
        if not self.required:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _refused("You didn't provide an API key: send it as 'Authorization: Bearer KEY'.")
        digest = key_digest(key.strip())
        found = None
        # Every digest is compared, so that time tells nothing about where a match is.
        for known, name in self.owners.items():
            if hmac.compare_digest(known, digest):
                found = name
        if found is None:
            raise _refused("Incorrect API key provided.")
        return found


def _refused(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", kind="authentication_error")


def key_digest(key: str) -> str:
    """sha256 of a key, in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key(name: str) -> tuple[str, str]:
    """A fresh key, and its line for the key file."""
    if not _NAME.fullmatch(name):
        raise InputError(f"'{name}' cannot name a key: use letters, digits, '_', '.' and '-'.")
    key = PREFIX + secrets.token_urlsafe(32)
    return key, f"{name} sha256:{key_digest(key)}"


def read_keys(settings: ServeSettings) -> ApiKeys:
    """The keys of the settings' file and environment.

    Raises InputError for a file that cannot be read or has a wrong line (named by its number, for
    a line may hold a secret), and when others can reach the endpoint but no key is set.
    """
    owners: dict[str, str] = {}
    limits: dict[str, Limits] = {}
    if settings.api_keys_file is not None:
        try:
            lines = settings.api_keys_file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the API key file {settings.api_keys_file} cannot be read ({error}): "
                "check its path and rights."
            ) from None
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if text and not text.startswith("#"):
                where = f"line {number} of the API key file {settings.api_keys_file}"
                name, value, *more = [*text.split(), ""]
                _add(owners, name, value, where=where, plain=False)
                found = parse_limits([word for word in more if word], where)
                if limits.setdefault(name, found) != found:
                    raise InputError(f"{where} has other limits than '{name}' has already.")
    entries = filter(None, map(str.strip, settings.api_keys.get_secret_value().split(",")))
    for number, entry in enumerate(entries, start=1):
        name, _, value = entry.partition("=")
        where = f"entry {number} of ECHODISTILL_SERVE_API_KEYS"
        _add(owners, name.strip(), value.strip(), where=where, plain=True)
    if not owners and not settings.local_only:
        raise InputError(
            f"an endpoint on {settings.host} can be reached by others and needs API keys: "
            "set ECHODISTILL_SERVE_API_KEYS or an API key file, or listen on 127.0.0.1."
        )
    return ApiKeys(owners, limits)


def _add(owners: dict[str, str], name: str, value: str, *, where: str, plain: bool) -> None:
    stored = _DIGEST.fullmatch(value)
    if not _NAME.fullmatch(name):
        raise InputError(f"{where} has no proper name before its key.")
    if stored is not None:
        owners[stored.group(1)] = name
    elif not plain:
        raise InputError(
            f"{where} is not 'name sha256:<64 hex digits>': make one with "
            "'python -m serve.auth NAME'; keys themselves are never stored."
        )
    elif len(value) < SHORTEST_KEY:
        raise InputError(f"{where} has a key under {SHORTEST_KEY} characters: use a longer one.")
    else:
        owners[key_digest(value)] = name


def main(arguments: list[str]) -> int:
    """Prints a new key to standard error, and its line for the key file to standard output."""
    if len(arguments) != 1:
        print("usage: python -m serve.auth NAME >> keys.txt", file=sys.stderr)
        return 2
    try:
        key, line = new_key(arguments[0])
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"The key of {arguments[0]}, shown this once: {key}", file=sys.stderr)
    print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
