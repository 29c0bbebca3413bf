"""The records that flow between Sora's parts: plain frozen dataclasses, with only conversion to and from JSON.

VideoRecord (a row of the manifest) or Rejection; with a ClipSpec, ClipWindows → (T, H, W, 3) uint8 clips in shards
→ a trained model → EvalReport and Recipe → Decision, ModelVersion → Prediction. docs/architecture.md shows where.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Sampling = Literal["uniform", "window"]
Aspect = Literal["stretch", "crop", "pad"]
Equalise = Literal["none", "histogram", "clahe"]
Outcome = Literal["promoted", "refused", "unchanged"]
LABEL_SEPARATOR = "|"  # between several labels of one video (`sora.tasks.multi`)

RULES: dict[str, str] = {
    # rule that reading a file can break → the fix; all rules about data: sora.dataset.quality.rules
    "bad_name": "rename the file or folder: its name is not UTF-8 (for many: `convmv -f latin1 -t utf8 -r`)",
    "not_a_video": "remove the file or give it a name that is no video's (readme, licence, csv)",
    "unreadable": "re-export the video; FFmpeg can't decode any frame of it",
    "truncated": "copy the video again from its source: the file ends or breaks before its last frame",
    "too_large": "use a shorter or smaller video, or raise the limits in params.yaml (of data/ under `validate`, of "
    "calls under `serve`)",
    "too_slow": "cut the video or scale it down, or raise validate.max_decode_seconds (of calls: serve.decode_timeout)",
    "symlink": "replace the link by the file itself (cp -L): DVC does not version what a link points to",
}


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """One row of the manifest: what one file is, from decoding all of it once.

    `path` is relative to the data folder, with forward slashes. A file that can't be used still has a row: `error` is
    then a rule of `sora.dataset.quality.rules`, `detail` says what was wrong, and unknown facts are 0, "" or
    None.
    """

    path: str
    sha256: str
    bytes: int
    label: str | None
    group: str | None
    codec: str
    width: int  # pixels, upright (after rotation)
    height: int
    rotation: int  # degrees clockwise that the player must turn the stored picture: 0, 90, 180, 270
    frames: int  # frames that really decode
    fps: float  # frames per second, from the timestamps of decoded frames
    duration: float  # seconds, first to last decoded frame plus one frame
    audio: bool
    brightness: float  # mean luma of sampled frames, 0 to 255
    signature: str  # hex: three 64-bit difference hashes; "" if the picture has too little texture to tell
    error: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A video that a rule of `sora.dataset.quality.rules` leaves out. A list entry only; the file is never touched."""

    path: str
    rule: str
    detail: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class ClipSpec:
    """How a video becomes clips: `(frames, height, width, 3) uint8`, and with `flow` a vector of their motion.

    It is part of every registered model.
    """

    frames: int = 16
    height: int = 112
    width: int = 112
    sampling: Sampling = "uniform"
    window_seconds: float = 2.0  # window sampling: the span that one clip covers
    max_clips: int = 8  # window sampling: maximum number of clips per video, evenly spaced
    aspect: Aspect = "crop"
    gamma: float = 1.0  # below 1 brightens dark footage; 1 leaves it
    equalise: Equalise = "none"
    flow: int = 0  # moments at which the tensor `flow` measures motion; 0: clips have no such tensor

    def to_dict(self) -> dict[str, Any]:
        """Without `flow` if it is 0, so that what earlier versions of Sora stored keeps its name."""
        value = asdict(self)
        if not self.flow:
            del value["flow"]
        return value

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ClipSpec:
        return cls(**value)


@dataclass(frozen=True, slots=True)
class ClipWindow:
    """One clip of a video: the indices, in decoding order of shown frames, that it is made of. May repeat an index."""

    clip: int  # 0, 1, … within the video
    indices: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()  # a frame and the next one, at each moment at which motion is measured


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a model needs besides its weights to answer for a file. Stored with the registered model."""

    clip: ClipSpec
    classes: tuple[str, ...]
    temperature: float = 1.0  # softmax(logits / temperature) is calibrated; of a multi-label model the sigmoid
    schema: int = 1  # of its task (`sora.tasks`)
    golden: tuple[dict[str, Any], ...] = ()  # [{"seed": int, "probabilities": [...]}]: answers to made-up clips
    model_sha256: str = ""  # of the model file: loading verifies it
    views: tuple[str, ...] = ()  # averaged with each clip's own answer (see `sora.store.augment.views`)
    unsure_below: float | None = None  # an answer with less confidence is unsure; None: no answer is
    multilabel: bool = False  # classes don't exclude each other: a video may have several, or none

    def to_dict(self) -> dict[str, Any]:
        lists = {"classes": list(self.classes), "golden": list(self.golden), "views": list(self.views)}
        return {**asdict(self), **lists}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Recipe:
        return cls(
            clip=ClipSpec.from_dict(value["clip"]),
            classes=tuple(value["classes"]),
            temperature=float(value["temperature"]),
            schema=int(value["schema"]),
            golden=tuple(value.get("golden", ())),
            model_sha256=value.get("model_sha256", ""),
            views=tuple(value.get("views", ())),
            unsure_below=value.get("unsure_below"),
            multilabel=value.get("multilabel", False),
        )


@dataclass(frozen=True, slots=True)
class Tried:
    """What a search found out about one candidate, by answers for videos that its training had not seen."""

    name: str
    accuracy: float
    low: float  # 95 % interval of the accuracy
    high: float
    log_loss: float  # nats a video
    videos: int
    seconds: float  # that it took
    settings: dict[str, str] = field(default_factory=dict)  # what was chosen for it
    chosen: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Tried:
        return cls(**value)


@dataclass(frozen=True)
class EvalReport:
    """One model on one split. `metrics` has flat names ("accuracy", "macro_f1", "ece", "log_loss", "latency_ms" …).

    `videos` has one entry per video, ordered by sha256: {"sha256", "path", "label", "predicted", "probabilities"}.
    For a multi-label model both are joined labels (`sora.tasks.multi`), "" for none: equal is an exact match.
    """

    split: Split
    classes: tuple[str, ...]
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]  # class → {"recall", "low", "high", "precision", "support"}
    confusion: list[list[int]]  # rows: true class, columns: predicted class; none for a multi-label model
    # [{"slice": "brightness", "value": "dark", "videos": n, "accuracy": a, "low", "high"}]
    slices: list[dict[str, Any]]
    videos: list[dict[str, Any]]
    temperature: float
    multilabel: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> EvalReport:
        return cls(**{**value, "classes": tuple(value["classes"])})


@dataclass(frozen=True)
class Decision:
    """The gate's verdict: `promote`, with the reasons in words; `evidence` holds the numbers behind them."""

    promote: bool
    reasons: tuple[str, ...]
    evidence: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelVersion:
    """One registered version, as `sora models` shows it."""

    version: int
    aliases: tuple[str, ...]
    metrics: dict[str, float]
    data_version: str
    created: str  # ISO 8601, UTC
    decision: str  # promoted | refused | rolled_back | manual | pending
    reasons: tuple[str, ...]
    run_id: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "aliases": list(self.aliases), "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one video. `label` is the most probable class, also for a multi-label model."""

    label: str
    probabilities: dict[str, float]
    version: int
    unsure: bool | None = None  # None: the model has no threshold
    labels: tuple[str, ...] | None = None  # for a multi-label model: all answered classes, the likeliest first

    def to_dict(self) -> dict[str, Any]:
        """As in the contract: `unsure` only if there is a threshold, `labels` only for a multi-label model."""
        value = {name: value for name, value in asdict(self).items() if value is not None}
        return value if self.labels is None else {**value, "labels": list(self.labels)}
