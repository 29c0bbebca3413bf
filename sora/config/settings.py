"""`params.yaml`: every setting, its default and its checked range, and the project that it stands in.

One pydantic model a section. An unknown key or a value out of range is a `SettingsError` that names the line's key,
what was received and what is allowed. `DEFAULT_PARAMS` (made from the models) is what `sora init` writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from sora.config.presets import PRESETS
from sora.core.errors import SettingsError
from sora.core.records import LABEL_SEPARATOR, ClipSpec

# Sections of params.yaml that no trained model depends on.
NOT_OF_LEARNING = ("serve", "schedule", "alert", "backup", "services")
# Settings (`section.name`) that came after the first release. Add every new one of the other sections here, with a
# default that leaves what Sora computes as it was (else give `sora.core.provenance.LEARNING` a new name as well).
ADDED = frozenset(
    f"validate.{name}"
    for name in ("max_bytes", "max_pixels", "max_frames", "max_seconds", "max_decode_seconds", "decode_memory")
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Validate(_Section):
    """Rules about good data. Per-video rules quarantine; four stop or warn about the whole set.

    The last ones bound what a file may cost: beyond them it is quarantined as `too_large` or `too_slow`. A day at 30
    frames a second, 8K, and five hours of 1080p keep within them.
    """

    min_frames: int = Field(8, ge=1)
    min_seconds: float = Field(0.3, ge=0)
    min_side: int = Field(32, ge=1)  # pixels, the shorter side
    min_fps: float = Field(4, gt=0)
    max_fps: float = Field(240, gt=0)
    duplicates: bool = True  # exact-duplicate and near-duplicate rules
    near_duplicate_bits: int = Field(10, ge=0, le=64)  # of 192: at most so many may differ
    min_classes: int = Field(2, ge=2)
    min_videos_per_class: int = Field(3, ge=1)
    max_rejected: float = Field(0.25, ge=0, le=1)  # share of the videos
    max_balance_shift: float = Field(0.2, ge=0, le=1)  # total variation against the last data version; warns
    max_bytes: int = Field(100_000_000_000, ge=1)
    max_pixels: int = Field(8192 * 4320, ge=1)  # a frame
    max_frames: int = Field(3_000_000, ge=1)
    max_seconds: float = Field(90_000, gt=0)
    max_decode_seconds: float = Field(1800, gt=0)  # of processor time
    decode_memory: int = Field(3_000_000_000, ge=100_000_000)  # bytes, of each process that decodes

    def file_limits(self) -> dict[str, Any]:
        """The fields of `sora.media.video.ffmpeg.Limits`."""
        return {name: getattr(self, name) for name in ("max_bytes", "max_seconds", "max_pixels", "max_frames")}

    def decoding(self) -> dict[str, Any]:
        """All that bounds the decoding of a file."""
        names = ("max_decode_seconds", "decode_memory")
        return {**self.file_limits(), **{name: getattr(self, name) for name in names}}


class Split(_Section):
    group_pattern: str | None = None  # regular expression on the path; its first capturing group is the group
    val: float = Field(0.15, gt=0, lt=0.5)
    test: float = Field(0.15, gt=0, lt=0.5)
    seed: int = 0

    @field_validator("group_pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                if re.compile(value).groups < 1:
                    raise ValueError("needs one capturing group, as in 'person(\\d+)'")
            except re.error as error:
                raise ValueError(f"is no regular expression: {error}") from error
        return value


class Clip(_Section):
    """The fields of `records.ClipSpec`, with ranges."""

    frames: int = Field(16, ge=2, le=256)
    height: int = Field(112, ge=16, le=1024, multiple_of=8)
    width: int = Field(112, ge=16, le=1024, multiple_of=8)
    sampling: Literal["uniform", "window"] = "uniform"
    window_seconds: float = Field(2.0, gt=0, le=3600)
    max_clips: int = Field(8, ge=1, le=1000)
    aspect: Literal["stretch", "crop", "pad"] = "crop"
    gamma: float = Field(1.0, ge=0.1, le=5)
    equalise: Literal["none", "histogram", "clahe"] = "none"

    def spec(self) -> ClipSpec:
        return ClipSpec(**self.model_dump())


class Shards(_Section):
    buckets: int = Field(16, ge=1, le=4096)
    workers: int = Field(0, ge=0, le=256)  # 0: one a core


class Model(_Section):
    """The two-branch residual fusion model (see `sora/model/classifier.py`).

    A field that is left out comes from the preset, and what the preset does not name has the default shown here.
    """

    preset: Literal["demo", "small", "base", "pretrained", "article"] = "small"
    streams: Literal["both", "low", "high"] = "both"  # low: motion alone; high: appearance alone
    low_filters: tuple[int, ...] = (16, 32, 64)  # a level each
    high_filters: tuple[int, ...] = (32, 64, 128)
    # The high network: residual, from scratch, or one that was trained on ImageNet (see `sora/model/backbone.py`).
    backbone: Literal["residual", "efficientnet-lite0", "mobilenetv2"] = "residual"
    backbone_trainable: bool = False  # its weights go on learning; else what is learnt is how to read its features
    blocks: int = Field(1, ge=1, le=8)  # residual blocks a level
    shift: float = Field(0.125, ge=0, le=0.5)  # share of the channels moved each way in time; 0: frames apart
    lateral: bool = False  # the low network's maps join the high network's before each level
    key_frames: int = Field(4, ge=1, le=64)  # that the high network sees
    fusion: Literal["concat", "gated", "gram"] = "concat"
    gated_width: int = Field(128, ge=8, le=2048)  # fusion gated: every level is brought to this width
    gram_width: int = Field(64, ge=8, le=512)  # fusion gram: every feature vector is brought to this width
    gram_vectors: Literal["level", "frame"] = "level"  # fusion gram: a vector a level and frame, or one a frame
    embedding: int = Field(128, ge=8, le=4096)
    dropout: float = Field(0.3, ge=0, lt=1)
    # binary: one logit, that of the second class; multilabel: a video has one class or several
    head: Literal["multiclass", "binary", "multilabel"] = "multiclass"

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, value: Any) -> Any:
        if isinstance(value, dict):
            preset = value.get("preset", cls.model_fields["preset"].default)
            if isinstance(preset, str) and preset in PRESETS:  # any other is the field's own error
                return {**PRESETS[preset].model, **value}
        return value

    @field_validator("low_filters", "high_filters")
    @classmethod
    def _filters(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        # Narrower than 16 crashed TensorFlow 2.21 with oneDNN 3 of 3 times (infra/DECISIONS.md).
        if not 1 <= len(value) <= 6 or any(v < 16 or v > 2048 or v % 8 for v in value):
            raise ValueError("needs 1 to 6 levels of 16 to 2048 filters, each a multiple of 8")
        return value

    @field_validator("lateral")
    @classmethod
    def _joins_two(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("streams") != "both":
            raise ValueError(f"joins two networks, but model.streams is {info.data.get('streams')}")
        if value and info.data.get("backbone") != "residual":
            raise ValueError(f"joins residual networks, but model.backbone is {info.data.get('backbone')}")
        return value


class Train(_Section):
    epochs: int = Field(30, ge=1, le=10_000)
    batch: int = Field(16, ge=1, le=4096)
    min_steps: int = Field(8, ge=1, le=10_000)  # optimiser steps an epoch: a small set is shown several times in each
    learning_rate: float = Field(2e-3, gt=0, le=1)
    weight_decay: float = Field(1e-4, ge=0, le=1)
    label_smoothing: float = Field(0.05, ge=0, lt=0.5)
    patience: int = Field(8, ge=1)  # epochs without a better validation loss
    class_weights: bool = True  # not with model.head multilabel: its probabilities would not mean what they say
    # Left-right flips as augmentation. A list names the exceptions: a class that is never mirrored, or a pair of
    # classes whose mirror images are each other's.
    flip: bool | Annotated[tuple[str | tuple[str, str], ...], Field(min_length=1)] = True
    jitter: bool = True  # small moves, contrast and brightness as augmentation, the same for all frames of a clip
    speed: float = Field(0, ge=0, le=4)  # slower motion, down to 1 / (1 + speed); 0: off
    crop: float = Field(0, ge=0, lt=1)  # a random part of the picture, that lacks at most this share of its area
    noise: float = Field(0, ge=0, le=64)  # deviation of pixel noise, at most, of 255 levels
    mix_up: float = Field(0, ge=0, le=10)  # alpha of mix-up: clips and their labels blended in pairs
    ema: float = Field(0, ge=0, lt=1)  # of the weights' average over epochs this share stays each epoch; 0: off
    seed: int = 0
    mixed_precision: Literal["auto", "on", "off"] = "auto"  # auto: on an accelerator only
    work_pool: str | None = None  # Prefect work pool of the GPU workers; none: train here

    @field_validator("flip")
    @classmethod
    def _once(cls, value: bool | tuple) -> bool | tuple:
        if not isinstance(value, bool):
            names = [name for entry in value for name in ((entry,) if isinstance(entry, str) else entry)]
            if len(set(names)) != len(names):
                raise ValueError("names a class twice")
        return value

    def mirrors(self, classes: Sequence[str]) -> list[int] | None:
        """For each class the number of its mirror image's class, -1 where it has none; None: each is its own.

        Raises:
            ValueError: `flip` names a class that is none of them.
        """
        if isinstance(self.flip, bool):
            return None
        result = list(range(len(classes)))
        for entry in self.flip:
            pair = (entry,) if isinstance(entry, str) else entry
            unknown = [name for name in pair if name not in classes]
            if unknown:
                raise ValueError(f"train.flip names {unknown[0]!r}, which is none of the classes")
            numbers = [list(classes).index(name) for name in pair]
            if len(numbers) == 1:
                result[numbers[0]] = -1
            else:
                result[numbers[0]], result[numbers[1]] = numbers[1], numbers[0]
        return result


class Eval(_Section):
    """How a model is asked. Travels in its recipe, so that the server asks as the evaluation did."""

    views: tuple[Literal["mirrored", "left", "right"], ...] = ()  # see `sora.store.augment.views`

    @field_validator("views")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a view twice")
        return value


class Unsure(_Section):
    """Below a confidence that is calibrated on validation an answer is marked as unsure."""

    precision: float | None = Field(None, gt=0, lt=1)  # wanted of the other answers; none: no answer is marked


class Gate(_Section):
    mode: Literal["better", "not_worse", "auto"] = "auto"  # auto: not_worse with new data, better without
    margin: float = Field(0.02, ge=0, le=0.5)  # not_worse: so much lower accuracy is still not worse
    min_test: int = Field(30, ge=1)  # videos
    confidence: float = Field(0.95, gt=0.5, lt=1)  # of the paired test in mode better
    max_class_drop: float = Field(0.15, ge=0, le=1)  # recall of any class against the champion's
    max_ece: float = Field(0.25, ge=0, le=1)
    max_latency_ms: float = Field(2000, gt=0)  # model call, one clip


class Serve(_Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    max_bytes: int = Field(200_000_000, ge=1)  # of one call: of its file, or of all its files together
    max_files: int = Field(16, ge=1, le=1000)  # in one call
    max_seconds: float = Field(600, gt=0)
    max_pixels: int = Field(4096 * 2304, ge=1)  # a frame
    max_frames: int = Field(40_000, ge=1)
    decode_workers: int = Field(2, ge=1, le=64)
    decode_timeout: float = Field(30, gt=0)  # seconds
    upload_timeout: float = Field(120, gt=0)  # seconds from the first byte to the last
    request_timeout: float = Field(180, gt=0)  # seconds from the first byte to the answer, the upload included
    drain_seconds: float = Field(0, ge=0, le=300)  # after SIGTERM: /readyz says 503 and all else goes on, for proxies
    decode_memory: int = Field(2_000_000_000, ge=100_000_000)  # bytes
    queue: int = Field(64, ge=1)
    header_timeout: float = Field(10, gt=0, le=300)  # seconds from a request's first byte to the end of its headers
    max_connections_per_peer: int = Field(128, ge=0)  # 0: no bound of its own; behind a proxy all are one peer's
    origins: tuple[str, ...] = ()  # of pages that may send besides the server's own: a proxy that changes Host
    poll_seconds: float = Field(2, gt=0)
    inbox_files: int = Field(1000, ge=0)  # corrections that may wait for review
    inbox_bytes: int = Field(2_000_000_000, ge=0)  # of all of them together

    @field_validator("origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not re.fullmatch(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", origin):
                raise ValueError(f"{origin!r} is no origin; write it as https://sora.example or http://10.0.0.5:8080")
        return value

    def file_limits(self) -> dict[str, Any]:
        """The fields of `sora.media.video.ffmpeg.Limits`."""
        return {name: getattr(self, name) for name in ("max_bytes", "max_seconds", "max_pixels", "max_frames")}


class Schedule(_Section):
    cron: str = "0 2 * * *"
    timezone: str = "UTC"
    grace_minutes: int = Field(90, ge=1)  # a nightly so much overdue raises the alert: more than one takes

    @field_validator("cron")
    @classmethod
    def _fires(cls, value: str) -> str:
        from croniter import croniter

        if len(value.split()) != 5 or not croniter.is_valid(value):
            raise ValueError("needs five cron fields, as in '0 2 * * *'")
        return value

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        from zoneinfo import ZoneInfo

        try:
            ZoneInfo(value)
        except (ValueError, OSError, KeyError) as error:  # ZoneInfoNotFoundError is a KeyError
            raise ValueError("is no time zone, as in 'Europe/Berlin'") from error
        return value


class Alert(_Section):
    # Gets a JSON POST when a nightly fails or does not happen. SORA_ALERT_WEBHOOK goes before it; see `flows.alerts`.
    webhook: str | None = None

    @field_validator("webhook")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("needs an http:// or https:// address")
        return value


class Backup(_Section):
    """What the nightly keeps elsewhere; `sora backup FILE` makes one at any time."""

    keep: int = Field(0, ge=0, le=1000)  # files; 0: the nightly makes none
    folder: str | None = None  # below it they lie; relative to the project, which must not hold it
    data: bool = True  # with the footage and clips that the served and recent versions need

    @model_validator(mode="after")
    def _somewhere(self) -> Backup:
        # No default: a folder of the project, or beside it, would be lost with the disk that it guards against.
        if self.keep and not self.folder:
            raise ValueError("keep needs a folder: name one on another disk in backup.folder")
        return self


class Services(_Section):
    """Servers that run elsewhere. None: Sora starts its own below .sora/.

    Credentials come from the environment (PREFECT_API_AUTH_STRING; MLFLOW_TRACKING_USERNAME and _PASSWORD).
    """

    prefect_api_url: str | None = None
    mlflow_tracking_uri: str | None = None


class Settings(_Section):
    """All of params.yaml."""

    name: str = Field("sora", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")  # experiment and registered model
    classes: tuple[str, ...] = ()
    validate_: Validate = Field(default_factory=Validate, alias="validate")
    split: Split = Field(default_factory=Split)
    clip: Clip = Field(default_factory=Clip)
    shards: Shards = Field(default_factory=Shards)
    model: Model = Field(default_factory=Model)
    train: Train = Field(default_factory=Train)
    eval: Eval = Field(default_factory=Eval)
    unsure: Unsure = Field(default_factory=Unsure)
    gate: Gate = Field(default_factory=Gate)
    serve: Serve = Field(default_factory=Serve)
    schedule: Schedule = Field(default_factory=Schedule)
    alert: Alert = Field(default_factory=Alert)
    backup: Backup = Field(default_factory=Backup)
    services: Services = Field(default_factory=Services)

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a class twice")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        model, frames = self.model, self.clip.frames
        if model.key_frames > frames:
            raise ValueError(
                f"model.key_frames {model.key_frames} is more than clip.frames {frames} "
                f"(model.preset is {model.preset})"
            )
        if (model.fusion, model.gram_vectors, model.streams) == ("gram", "frame", "both") and model.key_frames < frames:
            raise ValueError(
                f"model.gram_vectors frame needs both networks on every frame, but model.key_frames is "
                f"{model.key_frames} and clip.frames {frames} (model.preset is {model.preset})"
            )
        if model.head == "binary" and self.classes and len(self.classes) != 2:
            raise ValueError(f"model.head binary needs 2 classes, but classes names {len(self.classes)}")
        if self.multilabel:
            parted = [name for name in self.classes if LABEL_SEPARATOR in name]
            if parted:
                raise ValueError(
                    f"model.head multilabel joins the labels of a video by {LABEL_SEPARATOR!r}, but classes names "
                    f"{parted[0]!r}: name the single labels"
                )
            if self.unsure.precision is not None:
                raise ValueError(
                    "unsure.precision is about one answer a video, but model.head multilabel answers for each class "
                    "apart: leave it null"
                )
        if self.classes:
            self.train.mirrors(self.classes)
        if "mirrored" in self.eval.views and self.train.flip is not True:
            raise ValueError("eval.views has `mirrored`, which needs train.flip: true")
        if self.validate_.min_fps > self.validate_.max_fps:
            raise ValueError("validate.min_fps is above validate.max_fps")
        return self

    @property
    def multilabel(self) -> bool:
        """Whether a video may have several of the classes."""
        return self.model.head == "multilabel"

    def to_dict(self) -> dict[str, Any]:
        """Plain values (lists, not tuples) under params.yaml's own names."""
        return self.model_dump(mode="json", by_alias=True)

    def of_learning(self) -> dict[str, Any]:
        """What a trained model and the verdict on it depend on: `to_dict` without the sections `NOT_OF_LEARNING`, and
        without the settings `ADDED` that have their default. So a new Sora with new settings trains nobody's model
        again."""
        values = self.to_dict()
        defaults = Settings().to_dict()
        return {
            section: {
                name: setting
                for name, setting in value.items()
                if f"{section}.{name}" not in ADDED or setting != defaults[section][name]
            }
            if isinstance(value, dict)
            else value
            for section, value in values.items()
            if section not in NOT_OF_LEARNING
        }


def parse(text: str, source: str = "params.yaml") -> Settings:
    """Settings from YAML text.

    Raises:
        SettingsError: no YAML, an unknown key, or a value out of range; all problems in one message.
    """
    try:
        value = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{source} is not YAML: {error}", fix="correct the marked line") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{source} must hold sections, not a {type(value).__name__}", fix="see `sora init`'s file")
    try:
        return Settings.model_validate(value)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"]) or "the settings"
            received = "" if isinstance(problem["input"], dict) else f" (received {problem['input']!r})"
            lines.append(f"{where}: {problem['msg']}{received}")
        raise SettingsError(f"{source}: " + "; ".join(lines), fix=f"correct {source}") from error


@dataclass(frozen=True, slots=True)
class Project:
    """A folder with params.yaml. All paths that Sora reads or writes start here."""

    root: Path

    @property
    def params_file(self) -> Path:
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def data_dvc(self) -> Path:
        return self.root / "data.dvc"

    @property
    def splits_file(self) -> Path:
        """The append-only ledger sha256 → split; tracked by git, so that a clone keeps yesterday's test set."""
        return self.root / "splits.csv"

    @property
    def prepared(self) -> Path:
        """What DVC's stages make."""
        return self.root / "prepared"

    @property
    def manifest(self) -> Path:
        return self.prepared / "manifest.parquet"

    @property
    def journal(self) -> Path:
        """Facts of videos decoded since the last manifest was written: by an interrupted stage, or by `sora check`."""
        return self.state / "stages" / "manifest.jsonl"

    @property
    def quarantine(self) -> Path:
        """JSON list of `records.Rejection`."""
        return self.prepared / "quarantine.json"

    @property
    def shards(self) -> Path:
        return self.prepared / "shards"

    @property
    def state(self) -> Path:
        """Everything that is not versioned: servers' homes, locks, logs, caches."""
        return self.root / ".sora"

    @property
    def tokens(self) -> Path:
        """Bearer tokens of the API, hashed; see `sora token`."""
        return self.state / "tokens.json"

    @property
    def docs(self) -> Path:
        """Data Docs (HTML) of the last validation."""
        return self.state / "data_docs"

    def settings(self) -> Settings:
        try:
            return parse(self.params_file.read_text(encoding="utf-8"), str(self.params_file))
        except OSError as error:
            raise SettingsError(f"can't read {self.params_file}: {error}", fix="run `sora init`") from error


def find_project(start: Path) -> Project:
    """The nearest folder upwards of `start` that holds params.yaml.

    Raises:
        SettingsError: there is none.
    """
    start = start.resolve()
    if any("\ud800" <= character <= "\udfff" for character in str(start)):  # neither DVC nor SQLite take such a path
        raise SettingsError(f"the folder {str(start)!a} has a name that is not UTF-8", fix="rename the folder")
    for folder in (start, *start.parents):
        if (folder / "params.yaml").is_file():
            return Project(folder)
    raise SettingsError(
        f"no params.yaml in {start} or above it", fix="run `sora init DIR --data FOLDER`, or give --project DIR"
    )
