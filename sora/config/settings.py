"""All settings together: `params.yaml` as one record, read and checked.

An unknown key or a value out of range is a `SettingsError` that names the key, what was received and what is
allowed. `sora.config.render` writes params.yaml from these models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from sora.config.data import Clip, Shards, Split, Validate
from sora.config.evaluation import Eval, Gate, Unsure
from sora.config.model import Model
from sora.config.operations import Alert, Backup, Schedule, Services
from sora.config.presets import PRESETS
from sora.config.section import Section
from sora.config.serve import Serve
from sora.config.train import Train
from sora.core.errors import SettingsError
from sora.core.records import LABEL_SEPARATOR

if TYPE_CHECKING:
    from sora.tasks import Task

# Sections of params.yaml that no trained model depends on.
NOT_OF_LEARNING = ("serve", "schedule", "alert", "backup", "services")
# Settings (`section.name`) that came after the first release. Add every new one of the other sections here, with a
# default that changes nothing that Sora computes (else give `sora.core.provenance.LEARNING` a new name as well).
ADDED = frozenset(
    (
        *(
            f"validate.{name}"
            for name in ("max_bytes", "max_pixels", "max_frames", "max_seconds", "max_decode_seconds", "decode_memory")
        ),
        "clip.flow",
        "model.probe",
        "train.minutes",
    )
)


class Settings(Section):
    """All of params.yaml."""

    name: str = Field(
        "sora", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", description="the experiment and the registered model"
    )
    classes: tuple[str, ...] = Field((), description="a folder of data/ that is not listed here is quarantined")
    validate_: Validate = Field(
        default_factory=Validate,
        alias="validate",
        description="rules about good data; a video that breaks a per-video rule is listed as quarantined, never moved",
    )
    split: Split = Field(
        default_factory=Split, description="a video never changes its split; these settings apply to new videos"
    )
    clip: Clip = Field(default_factory=Clip, description="how a video becomes clips of frames x height x width")
    shards: Shards = Field(default_factory=Shards, description="the files that hold the clips")
    model: Model = Field(default_factory=Model, description="a field that is given here overrides the preset's")
    train: Train = Field(default_factory=Train, description="how a model learns")
    eval: Eval = Field(default_factory=Eval, description="how a model is queried, both in evaluation and by the server")
    unsure: Unsure = Field(
        default_factory=Unsure, description="answers below a confidence, which validation sets, are marked as unsure"
    )
    gate: Gate = Field(default_factory=Gate, description="when a candidate may replace the champion")
    serve: Serve = Field(default_factory=Serve, description="the API and its bounds")
    schedule: Schedule = Field(default_factory=Schedule, description="when the nightly runs")
    alert: Alert = Field(default_factory=Alert, description="who is told about a nightly that fails or does not happen")
    backup: Backup = Field(
        default_factory=Backup,
        description="after each nightly, including failed ones; `sora backup FILE` makes one at any time",
    )
    services: Services = Field(
        default_factory=Services,
        description="Servers that run elsewhere; null: Sora starts its own. Their logins come from the environment: "
        "PREFECT_API_AUTH_STRING, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
    )

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
        if self.model.head == "multilabel":
            parted = [name for name in self.classes if LABEL_SEPARATOR in name]
            if parted:
                raise ValueError(
                    f"model.head multilabel joins the labels of a video by {LABEL_SEPARATOR!r}, but classes names "
                    f"{parted[0]!r}: name the single labels"
                )
            if self.unsure.precision is not None:
                raise ValueError(
                    "unsure.precision is about one answer per video, but model.head multilabel answers for each class "
                    "separately: leave it null"
                )
        if self.classes:
            self.train.mirrors(self.classes)
        if "mirrored" in self.eval.views and self.train.flip is not True:
            raise ValueError("eval.views has `mirrored`, which needs train.flip: true")
        if self.validate_.min_fps > self.validate_.max_fps:
            raise ValueError("validate.min_fps is above validate.max_fps")
        return self

    @property
    def task(self) -> Task:
        """What a model of this project is asked about a video."""
        return self.model.task

    def to_dict(self) -> dict[str, Any]:
        """Plain values (lists, not tuples) under params.yaml's own names."""
        return self.model_dump(mode="json", by_alias=True)

    def of_learning(self) -> dict[str, Any]:
        """What a trained model and the verdict on it depend on: `to_dict` without the sections `NOT_OF_LEARNING` and
        without the settings `ADDED` that have their default. So a new Sora with new settings does not train every
        model again."""
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


def of_new_project(values: Mapping[str, Any] | None = None) -> Settings:
    """What `sora init` writes: `values`, and for the rest the preset `auto` with the clips that it was made for.

    They are not the defaults of omitted settings, which keep their meaning for older projects.
    """
    given = dict(values or {})
    preset = "auto"
    given["model"] = {"preset": preset, **given.get("model", {})}
    given["clip"] = {**PRESETS[preset].clip.to_dict(), **given.get("clip", {})}
    return Settings.model_validate(given)


def parse(text: str, source: str = "params.yaml") -> Settings:
    """Settings from YAML text.

    Raises:
        SettingsError: not YAML, an unknown key, or a value out of range; one message names all problems.
    """
    try:
        value = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{source} is not YAML: {error}", fix="correct the marked line") from error
    if not isinstance(value, dict):
        raise SettingsError(
            f"{source} must hold sections, not a {type(value).__name__}", fix="write it as `sora init` does"
        )
    try:
        return Settings.model_validate(value)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"]) or "the settings"
            received = "" if isinstance(problem["input"], dict) else f" (received {problem['input']!r})"
            lines.append(f"{where}: {problem['msg']}{received}")
        raise SettingsError(f"{source}: " + "; ".join(lines), fix=f"correct {source}") from error
