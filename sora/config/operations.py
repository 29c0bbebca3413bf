"""The sections about keeping it running: schedule, alert, backup, services."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from sora.config.section import Section


class Schedule(Section):
    """When the nightly runs."""

    cron: str = Field("0 2 * * *", description="minute, hour, day of the month, month, day of the week")
    timezone: str = Field("UTC", description="such as Europe/Berlin")
    grace_minutes: int = Field(
        90, ge=1, description="minutes that a nightly may be late before the alert; more than one takes"
    )

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
            raise ValueError("is not a time zone, as in 'Europe/Berlin'") from error
        return value


class Alert(Section):
    """Who is told about a nightly that fails or does not happen."""

    webhook: str | None = Field(  # see `flows.alerts`
        None,
        description="An address that gets a JSON POST when a nightly fails or does not happen. This file is in git: "
        "where the address holds a token, set SORA_ALERT_WEBHOOK in the environment instead, which takes precedence.",
    )

    @field_validator("webhook")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("needs an http:// or https:// address")
        return value


class Backup(Section):
    """What the nightly keeps elsewhere; `sora backup FILE` makes one at any time."""

    keep: int = Field(0, ge=0, le=1000, description="backups that are kept, the latest; 0: the nightly makes none")
    folder: str | None = Field(
        None, description="where they are kept, on another disk than the project's; keep needs it"
    )
    data: bool = Field(True, description="with the videos and clips that the served and recent versions need")

    @model_validator(mode="after")
    def _somewhere(self) -> Backup:
        # No default: a folder in or beside the project would be lost with the disk that the backup guards against.
        if self.keep and not self.folder:
            raise ValueError("keep needs a folder: name one on another disk in backup.folder")
        return self


class Services(Section):
    """Servers that run elsewhere. None: Sora starts its own below .sora/."""

    prefect_api_url: str | None = Field(None, description="the address of Prefect's API, which ends in /api")
    mlflow_tracking_uri: str | None = Field(None, description="the address of MLflow's server")
