"""Regular expressions of an adapter's configuration, matched as peft matches them.

Anyone may have written them, and the matching of some never ends: a process of its own does it, within a time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from ...errors import QwenMLXError, shortened

SECONDS = 10.0
_PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
json.dump([[re.fullmatch(pattern, name) is not None for name in names] for pattern in patterns], sys.stdout)
"""


def full_matches(patterns: Sequence[str], names: Sequence[str], where: str) -> list[list[bool]]:
    """For each pattern, whether it matches each name entirely. Raises QwenMLXError, beginning with `where`, for an
    expression that is none or takes longer than SECONDS."""
    if all(re.fullmatch(r"[\w.]*", pattern) for pattern in patterns):  # nothing in them repeats
        return [[re.fullmatch(pattern, name) is not None for name in names] for pattern in patterns]
    text = json.dumps([list(patterns), list(names)])
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM], input=text, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise QwenMLXError(
            f"{where}: its patterns take more than {SECONDS:g} s to match; write the names out."
        ) from None
    if result.returncode:
        reason = shortened((result.stderr.strip().splitlines() or ["it ended early"])[-1])
        raise QwenMLXError(f"{where}: a pattern is no regular expression ({reason}).")
    matches: list[list[bool]] = json.loads(result.stdout)
    return matches
