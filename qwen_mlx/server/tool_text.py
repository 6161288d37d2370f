"""Tool calls in an answer as it streams: what may belong to a call is held back until the answer has ended."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from ..generation.text import overlap
from ..generation.tools import OPEN, Tool, parse_tool_calls

UNTAGGED_STARTS = ("{", "```")  # small models leave out the tags


class ToolText:
    """An answer's text: `add` returns what is surely no call, `finish` the rest and the calls, in OpenAI's shape. A
    call that cannot be run is text, so that nothing is lost."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self._tools, self._text, self._shown = tools, "", 0

    def add(self, text: str) -> str:
        """The newly complete text that can be shown."""
        self._text += text
        start = self._text.lstrip()
        if not start or start.startswith(UNTAGGED_STARTS) or any(s.startswith(start) for s in UNTAGGED_STARTS):
            return ""
        at = self._text.find(OPEN)
        end = at if at >= 0 else len(self._text) - overlap(self._text, (OPEN,))
        shown = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return shown

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text and the calls."""
        calls = parse_tool_calls(self._text, self._tools)
        if not calls or any(call.error for call in calls):
            return self._text[self._shown :], []
        return "", [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for call in calls
        ]
