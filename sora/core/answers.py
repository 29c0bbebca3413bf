"""What the API answers: one definition for the server, which validates against it, and for the client.

Frozen dataclasses of the standard library only, so that a program with `sora.client` needs neither pydantic nor
FastAPI. The fields are in the order of the JSON. A field of `PredictAnswer` or `FileProblem` that has its default is
left out of the JSON. `metadata` becomes the description in /openapi.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Number = int | float  # a whole number stays one in JSON: 4, not 4.0


class _Body:
    """Pydantic's setting for the classes below: it also checks the fields of a value that already is one of them."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, str]] = {"revalidate_instances": "always"}


def _text(description: str) -> dict[str, str]:
    return {"description": description}


@dataclass(frozen=True, slots=True)
class Span(_Body):
    """Seconds from the video's first frame."""

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Window(_Body):
    """What one clip of a longer video shows."""

    start: float
    end: float
    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictAnswer(_Body):
    """The answer for one video: probabilities are the mean over its clips, calibrated."""

    filename: str
    label: str = field(metadata=_text("the most probable class"))
    probabilities: dict[str, float]
    version: int
    unsure: bool | None = field(
        default=None, metadata=_text("whether it is below the model's threshold; absent if the model has none")
    )
    labels: tuple[str, ...] | None = field(
        default=None,
        metadata=_text(
            "of a multi-label model: every class with a probability of at least 0.5, likeliest first; may be empty. "
            "Absent for other models. With it, probabilities don't sum to 1"
        ),
    )
    data_version: str
    clips: int
    seconds: dict[str, float] = field(metadata=_text("by stage: upload, wait, decode, queue, model"))
    embedding: tuple[float, ...] = field(default=(), metadata=_text("mean over the clips; present with ?embedding=1"))
    timeline: tuple[Window, ...] = field(
        default=(),
        metadata=_text("by clip, in order of time; present for several clips, and with ?timeline=1"),
    )
    span: Span | None = field(default=None, metadata=_text("where the label was decided; present with the timeline"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemAnswer(_Body):
    """RFC 9457, with `fix`: what the caller can do."""

    type: str
    title: str
    status: int
    detail: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileProblem(ProblemAnswer):
    """Why one file of several has no answer."""

    rule: str | None = field(default=None, metadata=_text("that the video breaks; absent if it is not to blame"))
    stage: str | None = field(default=None, metadata=_text("the stage in which its time was up"))
    filename: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictAnswers(_Body):
    """One call with several files: an answer or a problem for each, in order, all by one version."""

    answers: tuple[PredictAnswer | FileProblem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAnswer(_Body):
    """The served version, and how following the champion goes. `version` is null while none is served; `following` then
    says why."""

    version: int | None
    classes: tuple[str, ...]
    clip: dict[str, Any] | None
    data_version: str | None
    run_id: str | None
    digest: str | None = field(metadata=_text("sha256 of the model file"))
    temperature: Number | None
    multilabel: bool = field(metadata=_text("whether a video may have several classes"))
    metrics: dict[str, Number]
    since: str | None = field(metadata=_text("when this server began to answer with it"))
    following: dict[str, Any]
    limits: dict[str, Number] = field(metadata=_text("of one call and of one video"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CardAnswer(_Body):
    """One model version. `decision` and what follows are null if the registry does not tell."""

    version: int
    data_version: str
    run_id: str
    digest: str = field(metadata=_text("sha256 of the model file"))
    classes: tuple[str, ...]
    clip: dict[str, Any]
    temperature: Number
    metrics: dict[str, Number]
    since: str = field(metadata=_text("when this server began to answer with it"))
    decision: str | None = field(metadata=_text("promoted, manual, …: why it is served"))
    reasons: tuple[str, ...] | None
    created: str | None
    problem: str | None = field(metadata=_text("why the registry does not tell"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainAnswer(_Body):
    """What decided for a class, in the clip of the video that speaks most for it."""

    filename: str
    label: str = field(metadata=_text("the class that is explained: the answer, or the one asked for"))
    probabilities: dict[str, float]
    version: int
    data_version: str
    method: str
    clips: int
    clip: int = field(metadata=_text("the clip that is explained, from 0: the one most probably of the class"))
    log_odds: float = field(metadata=_text("of the class in that clip: log(p / (1 - p)), calibrated"))
    weights: list[float] = field(metadata=_text("each frame's share of the evidence; their sum is 1, or 0"))
    heat: list[list[list[float]]] = field(
        metadata=_text("frame, row, column: evidence from 0 to 1, the clip's hottest")
    )
    strip: str = field(metadata=_text("PNG in base64: frames, the same with heat maps, bars of the frames' weights"))
    strip_frames: list[int] = field(metadata=_text("the frames in the strip, from 0"))
    seconds: dict[str, float] = field(metadata=_text("by stage: upload, wait, decode, queue, model, explain"))


@dataclass(frozen=True, slots=True)
class Sender(_Body):
    """Who sent a correction, and how reviews of that sender's corrections ended."""

    name: str = field(metadata=_text("a token's name; `address …` for one that came without a token"))
    accepted: int
    refused: int = field(metadata=_text("rejected, or accepted under another label"))
    often_refused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction(_Body):
    """A clip that is waiting for review."""

    id: str = field(metadata=_text("sha256 of the clip"))
    bytes: int
    filename: str
    label: str = field(metadata=_text("what it is, according to the last sender"))
    said: dict[str, int] = field(metadata=_text("label → how often it was sent"))
    predicted: str
    version: int
    received: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(Correction):
    """A clip as a reviewer sees it."""

    sent_by: tuple[Sender, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections(_Body):
    """The inbox, newest last, and its quota."""

    entries: tuple[Waiting, ...]
    max_files: int
    max_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted(_Body):
    """`path` is below data/; `next` says what makes it count."""

    id: str
    path: str
    next: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected(_Body):
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive(_Body):
    status: Literal["alive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready(_Body):
    status: Literal["ready"]
    version: int
