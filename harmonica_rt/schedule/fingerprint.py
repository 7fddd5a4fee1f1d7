"""A short fingerprint of a model's config, which shows whether a schedule was made for this model.

It covers the config alone: a schedule fits whatever the parameters are. A saved plan needs more (`model.fingerprint`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def config_fingerprint(config: Mapping[str, object]) -> str:
    """`sha256:` and sixteen hex digits, computed over the config's public entries in sorted order.

    Entries whose names begin with an underscore (where it was loaded from, the library's version) are ignored.
    """
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    text = json.dumps(public, sort_keys=True, default=str, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]
