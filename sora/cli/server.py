"""What stays up, and who may call it: serve, up, token."""

from __future__ import annotations

import click

from sora.cli.common import common_options, current_project, json_option, print_json
from sora.core.progress import echo


@click.command()
@click.option("--host", help="[default: serve.host of params.yaml, 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="[default: serve.port of params.yaml, 8000]")
@common_options
def serve(host: str | None, port: int | None) -> None:
    """Serve the champion over HTTP; it follows the alias without a restart."""
    from sora.serving.launch import serve as serve_project

    serve_project(current_project(), host, port)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--prefect-port", type=click.IntRange(0, 65535), default=4200, show_default=True)
@click.option("--mlflow-port", type=click.IntRange(0, 65535), default=5000, show_default=True)
@click.option("--api-port", type=click.IntRange(0, 65535), help="[default: serve.port of params.yaml, 8000]")
@common_options
def up(host: str, prefect_port: int, mlflow_port: int, api_port: int | None) -> None:
    """Run everything on one machine: Prefect, MLflow, a worker with the nightly schedule, the API."""
    from sora.cli.supervisor import up as start_all

    start_all(current_project(), host=host, prefect_port=prefect_port, mlflow_port=mlflow_port, api_port=api_port)


@click.group()
def token() -> None:
    """Manage the API's bearer tokens; a running server picks up changes."""


@token.command("add")
@click.argument("name")
@click.option("--review", is_flag=True, help="It may also review corrections; accepted ones become training data.")
@json_option
@common_options
def token_add(name: str, review: bool, as_json: bool) -> None:
    """Make a token for NAME and print it once: only its hash is kept."""
    from sora.serving.tokens import TokenFile

    made = TokenFile(current_project().tokens).add(name, review=review)
    if as_json:
        print_json({"name": name, "token": made, "review": review})
    else:
        echo(made)


@token.command("list")
@json_option
@common_options
def token_list(as_json: bool) -> None:
    """List the tokens' names, when they were made, and which may review corrections."""
    from sora.serving.tokens import TokenFile

    known = TokenFile(current_project().tokens).tokens()
    if as_json:
        print_json([{"name": one.name, "created": one.created, "review": one.review} for one in known])
        return
    for one in known:
        echo(f"{one.created[:16].replace('T', ' ')}  {one.name}{'  (may review)' if one.review else ''}")


@token.command("revoke")
@click.argument("name")
@json_option
@common_options
def token_revoke(name: str, as_json: bool) -> None:
    """Revoke NAME's token."""
    from sora.serving.tokens import TokenFile

    file = TokenFile(current_project().tokens)
    left = file.revoke(name)
    if as_json:
        print_json({"name": name, "left": left})
    elif not left:
        echo(f"no token is left, so nobody may call the API; remove {file.path} to serve this machine without tokens")
