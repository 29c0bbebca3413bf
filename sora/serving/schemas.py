"""What /openapi.json says besides the answers of `sora.core.answers`: problems and uploads."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from sora.core.answers import ProblemAnswer
from sora.serving import problems


def problem_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`."""
    content = {problems.MEDIA_TYPE: {"schema": TypeAdapter(ProblemAnswer).json_schema()}}
    return {status: {"description": problems.TITLES[status], "content": content} for status in statuses}


UPLOAD_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "minItems": 1,
                        "description": "a video file, or several parts with this name",
                    }
                },
            }
        }
    },
}
