"""What the verbs share: their options, the project they work on, and JSON on standard output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sora.core.progress import echo, json_text

if TYPE_CHECKING:
    from sora.config import Project

Verb = TypeVar("Verb", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")


def common_options(verb: Verb) -> Verb:
    """Adds the options that every verb takes. They may stand anywhere among the verb's own options."""
    verb = click.option("--debug", is_flag=True, expose_value=False, callback=_keep("debug"), help="Show tracebacks.")(
        verb
    )
    return click.option(
        "--project",
        type=click.Path(path_type=Path, file_okay=False),
        expose_value=False,
        callback=_keep("project"),
        help="The project's folder [default: the nearest params.yaml upwards].",
    )(verb)


def current_project() -> Project:
    """The project that `--project` names, or else the nearest one upwards.

    Raises:
        SettingsError: there is no project.
    """
    from sora.config import find_project

    given = click.get_current_context().find_root().meta.get("sora.project")
    return find_project(given or Path.cwd())


def print_json(value: object) -> None:
    """Prints one JSON document on standard output."""
    echo(json_text(json.dumps(value, ensure_ascii=False, allow_nan=False)))


def _keep(name: str) -> Callable[[click.Context, click.Parameter, object], None]:
    def callback(ctx: click.Context, _: click.Parameter, value: object) -> None:
        if value:
            ctx.find_root().meta[f"sora.{name}"] = value

    return callback
