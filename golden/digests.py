"""Digests: sha256 of bytes, and the one text that equal JSON values have."""

from __future__ import annotations

import hashlib
import json


def canonical(value: object) -> bytes:
    """Return JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256(data: bytes) -> str:
    """Return the sha256 of bytes in hex."""
    return hashlib.sha256(data).hexdigest()
