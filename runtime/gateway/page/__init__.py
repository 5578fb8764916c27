"""The status page: one static file, which holds no data and fetches from its own port
alone. What it shows comes by `/admin/v1/view`, with the operator's token."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@cache
def page() -> tuple[bytes, Mapping[str, str]]:
    """The page and its headers: the policy names its one script and its one style by their
    hashes."""
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for kind in ("script", "style"):
        found = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        hashes[kind] = " ".join(map(_hash, found))
    return text.encode(), {
        "content-security-policy": POLICY.format(**hashes),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
