"""What goes wrong with a request, as RFC 9457 problem documents (`application/problem+json`).

Every document has `type`, `title`, `status`, `detail`, and `fix`: what the caller can do about it.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from sora.core.answers import FileProblem
from sora.core.errors import ServiceError, VideoError

MEDIA_TYPE = "application/problem+json"

TITLES = {
    400: "The request can't be read",
    401: "A token is needed",
    403: "Not from here",
    404: "No such address",
    405: "Not with this method",
    408: "The upload took too long",
    409: "Not as things stand",
    411: "The length is missing",
    413: "Too large",
    415: "Not a multipart upload",
    422: "The video can't be used",
    429: "Too many requests at once",
    500: "The server failed",
    503: "Not ready",
    504: "It took too long",
    507: "No room on the server's disk",
}


# What an uploader can do; the fixes of `records.RULES` speak to the owner of a data folder.
_FIXES = {
    "not_a_video": "send a video file, as mp4, mov, mkv, webm, avi or gif",
    "unreadable": "re-export the video and send it again",
    "too_large": "send a shorter or smaller video; /v1/model names the limits",
    "too_slow": "cut the video or scale it down",
}


class Problem(Exception):
    """A request that can't be answered. Raised anywhere below a route; the application turns it into a response.

    Arguments:
        status: HTTP status, 400 to 599.
        detail: the rule and what was received.
        fix: what the caller can do.
        kind: the last part of `type`; a stable word that programs compare.
        headers: more response headers, such as Retry-After.
    """

    def __init__(
        self, status: int, detail: str, *, fix: str, kind: str = "", headers: dict[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.fix = fix
        self.kind = kind or TITLES.get(status, "problem").lower().replace(" ", "-").replace("'", "")
        self.headers = headers or {}
        self.more = more

    def document(self) -> dict[str, Any]:
        return {
            "type": f"urn:sora:problem:{self.kind}",
            "title": TITLES.get(self.status, "The request failed"),
            "status": self.status,
            "detail": self.detail,
            "fix": self.fix,
            **self.more,
        }

    def of_file(self, filename: str) -> FileProblem:
        """The same for one file of several."""
        document = self.document()
        known = {name: document[name] for name in ("type", "title", "status", "detail", "fix")}
        return FileProblem(**known, rule=self.more.get("rule"), stage=self.more.get("stage"), filename=filename)

    def response(self) -> JSONResponse:
        return JSONResponse(self.document(), status_code=self.status, headers=self.headers, media_type=MEDIA_TYPE)


def of_video(error: VideoError, name: str) -> Problem:
    """The problem of one uploaded video: 413 if it is beyond a limit of this server, else 422.

    `name` is the client's own name for the file, which replaces any path of this server in the message.
    """
    status = 413 if error.rule == "too_large" else 422
    fix = _FIXES.get(error.rule) or error.fix or "send another video file"
    return Problem(status, error.message, fix=fix, kind=error.rule.replace("_", "-"), rule=error.rule, filename=name)


def of_service(error: ServiceError) -> Problem:
    """The problem of a request that may succeed later."""
    return Problem(503, error.message, fix=error.fix or "try again", headers={"Retry-After": "5"})


def of_deadline(seconds: float, stage: str) -> Problem:
    """The problem of a request whose time is up: 504 if its own video took the time, else 503: the server is busy.

    Arguments:
        seconds: the time that a request gets.
        stage: the stage that it was in, one of `metrics.STAGES`.
    """
    if stage == "decode":
        return Problem(
            504,
            f"the request's {seconds:g} s were up while its video was being decoded",
            fix="cut the video, scale it down, or have serve.request_timeout raised",
            kind="deadline",
            stage=stage,
        )
    return Problem(
        503,
        f"the request's {seconds:g} s were up while it waited for {'a decoder' if stage == 'wait' else 'the model'}",
        fix="try again when the server is less busy, or have serve.request_timeout raised",
        kind="deadline",
        headers={"Retry-After": "5"},
        stage=stage,
    )
