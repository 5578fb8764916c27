"""API keys and tokens: kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foreserve.models.codec import from_json
from foreserve.models.errors import InvalidInput
from foreserve.runtime.gateway.errors import ApiError, retry_after


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What one key may do."""

    sha256: str
    """Of the key, in hexadecimal."""
    tenant: str = "default"
    llms: tuple[str, ...] | None = None
    """None: all."""
    slo_class: str = "default"
    rate_rps: float | None = None
    """Requests a second, on average; bursts of as many as one second brings (at least
    one). None: as many as it likes."""

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise InvalidInput("sha256 must be 64 lower-case hexadecimal digits")
        if self.rate_rps is not None and not self.rate_rps > 0:
            raise InvalidInput("rate_rps must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFile:
    """A file of API keys."""

    keys: tuple[ApiKey, ...]


ANYONE = ApiKey(sha256=64 * "0")
"""Who asks where no keys are required."""


def hashed(secret: str | bytes) -> str:
    """SHA-256 of a key or token: enough for secrets that are long and random."""
    data = secret.encode() if isinstance(secret, str) else secret
    return hashlib.sha256(data).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file ``{"keys": [{"sha256": …, "tenant": …}, …]}``."""
    return from_json(KeyFile, path.read_text(), file=str(path)).keys


def read_token(path: Path) -> str:
    """Hash of the token in a file that only its owner may read."""
    if path.stat().st_mode & 0o077:
        raise InvalidInput(
            "others may read this token", file=str(path), hint=f"chmod 600 {path}"
        )
    token = path.read_bytes().strip()
    if len(token) < 16:
        raise InvalidInput("a token has at least 16 characters", file=str(path))
    return hashed(token)


def bearer(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The token of ``Authorization: Bearer``, or of ``x-api-key``."""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            return value.strip()
    return None


def matches(token: bytes | None, wanted: str | None) -> bool:
    """Whether ``token`` has the hash ``wanted``."""
    if token is None or wanted is None:
        return False
    return hmac.compare_digest(hashed(token), wanted)


class Keys:
    """Checks keys, and counts their requests. Mutable, for one event loop."""

    def __init__(self, keys: Sequence[ApiKey] | None) -> None:
        self._keys = keys
        self.required = keys is not None
        self._spent: dict[str, tuple[float, float]] = {}

    def check(self, headers: Sequence[tuple[bytes, bytes]]) -> ApiKey:
        """Who asks; 401 if nobody we know."""
        if self._keys is None:
            return ANYONE
        token = bearer(headers)
        found = None
        if token is not None:
            digest = hashed(token)
            for key in self._keys:
                # No early end: the time must not tell which keys there are.
                if hmac.compare_digest(digest, key.sha256):
                    found = key
        if found is None:
            raise ApiError(
                401,
                "invalid_request_error",
                "invalid_api_key",
                "No valid API key; send it as 'Authorization: Bearer <key>'.",
                headers=[(b"www-authenticate", b"Bearer")],
            )
        return found

    def spend(self, key: ApiKey, now_s: float) -> None:
        """Count one request of ``key``; 429 if that is too many."""
        if key.rate_rps is None:
            return
        burst = max(1.0, key.rate_rps)
        left, at_s = self._spent.get(key.sha256, (burst, now_s))
        left = min(burst, left + (now_s - at_s) * key.rate_rps)
        if left < 1:
            self._spent[key.sha256] = (left, now_s)
            raise ApiError(
                429,
                "rate_limit_error",
                "tenant_limit",
                f"More than {key.rate_rps:g} requests a second; wait.",
                headers=retry_after((1 - left) / key.rate_rps, 0.0),
            )
        self._spent[key.sha256] = (left - 1, now_s)
