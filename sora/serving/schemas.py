"""The answers' shapes, as /openapi.json shows them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sora.serving import problems


class Span(BaseModel):
    """Seconds from the video's first frame."""

    start: float
    end: float


class Window(Span):
    """What one clip of a longer video shows."""

    label: str
    probabilities: dict[str, float]


class PredictAnswer(BaseModel):
    """The answer for one video: probabilities are the mean over its clips, calibrated."""

    filename: str
    label: str = Field(description="the most probable class")
    probabilities: dict[str, float]
    version: int
    data_version: str
    clips: int
    seconds: dict[str, float] = Field(description="by stage: upload, wait, decode, queue, model")
    labels: list[str] | None = Field(
        None,
        description="of a multi-label model: every class of a probability of at least 0.5, the likeliest first; may be "
        "empty. Absent of other models. Probabilities then don't sum to 1",
    )
    unsure: bool | None = Field(None, description="below the model's threshold; absent where it has none")
    timeline: list[Window] | None = Field(
        None, description="by clip, in the order of time; present for several clips, and with ?timeline=1"
    )
    span: Span | None = Field(None, description="where the label was decided; present with the timeline")
    embedding: list[float] | None = Field(None, description="mean over the clips; present with ?embedding=1")


class ProblemAnswer(BaseModel):
    """RFC 9457, and `fix`: what the caller can do."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    fix: str


class FileProblem(ProblemAnswer):
    """Why one file of several has no answer."""

    filename: str


class PredictAnswers(BaseModel):
    """One call with several files: an answer or a problem for each, in their order, all by one version."""

    answers: list[PredictAnswer | FileProblem]


class ModelAnswer(BaseModel):
    """What serves now, and how following the champion goes."""

    version: int | None
    classes: list[str]
    clip: dict[str, Any] | None
    data_version: str | None
    run_id: str | None
    digest: str | None
    temperature: float | None
    multilabel: bool = Field(description="whether a video may have several of the classes")
    metrics: dict[str, float]
    since: str | None
    following: dict[str, Any]
    limits: dict[str, float]


class Alive(BaseModel):
    status: Literal["alive"]


class Ready(BaseModel):
    status: Literal["ready"]
    version: int


def problem_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`."""
    content = {problems.MEDIA_TYPE: {"schema": ProblemAnswer.model_json_schema()}}
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
                        "description": "a video file, or several parts of this name",
                    }
                },
            }
        }
    },
}
