"""All verbs under one command, `sora`."""

from __future__ import annotations

import click

from sora import __version__
from sora.cli import ask, care, data, model, night, project, server, tune, versions
from sora.cli.common import common_options

_VERBS = (
    project.init,
    project.check,
    night.run,
    tune.tune,
    versions.models,
    model.model,
    versions.promote,
    versions.rollback,
    night.reproduce,
    ask.predict,
    ask.embed,
    ask.similar,
    server.serve,
    server.token,
    server.up,
    care.doctor,
    project.splits,
    data.data,
    versions.gc,
    care.backup,
    care.restore,
)


@click.group(commands=_VERBS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sora")
@common_options
def cli() -> None:
    """A folder of labelled videos becomes a served video classifier that retrains itself every night."""
