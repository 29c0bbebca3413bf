"""Turns every way in which a verb can end into an exit code and, if it failed, a message with a fix."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import click

from sora.core.errors import DiskFull, ReadOnly, ServiceError, SoraError
from sora.core.files import disk_failure
from sora.core.progress import echo


def run_verb(arguments: list[str]) -> int:
    """Runs a verb and returns its exit code. With `--debug` a failure is raised instead, for its traceback."""
    from sora.cli.verbs import cli

    debug = "--debug" in arguments
    try:
        cli.main(args=arguments, prog_name="sora", standalone_mode=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 3
    except (KeyboardInterrupt, click.Abort):
        echo("stopped; run the same command again to continue", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SoraError as error:
        if debug:
            raise
        echo(f"sora: {with_disk(error, arguments)}", err=True)
        return error.exit_code
    except BrokenPipeError:
        return 0
    except Exception as error:
        if debug:
            raise
        echo(f"sora: {unforeseen(error, arguments)}", err=True)
        return 3
    return 0


def with_disk(error: SoraError, arguments: list[str]) -> str:
    """The error's message. A server's or a child's failure also names the disk if it is full or read-only."""
    if not isinstance(error, ServiceError) or isinstance(error, DiskFull | ReadOnly):
        return str(error)
    disk = disk_failure(_place(arguments), error.message)
    return f"{error.message}\n  {disk}" if disk else str(error)


def unforeseen(error: Exception, arguments: list[str]) -> str:
    """A message for an exception that nothing in Sora translated."""
    # Libraries wrap the system's error: it, or its text, is somewhere in the chain.
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = "\n".join(str(one) for one in chain)
    disk = disk_failure(_place(arguments), text)
    if disk is not None:
        return f"{disk.message} ({type(error).__name__}: {error})\n  fix: {disk.fix}"
    if isinstance(error, PermissionError):
        return f"not allowed: {error}\n  fix: make the folder writable, or use another one"
    return f"{type(error).__name__}: {error}\n  fix: run again with --debug and report the traceback"


def _place(arguments: list[str]) -> Path:
    """The folder that a verb wrote to: the project's, or the current one."""
    projects = [after for name, after in pairwise(arguments) if name == "--project"]
    projects += [name.removeprefix("--project=") for name in arguments if name.startswith("--project=")]
    return Path(projects[0] if projects else ".").absolute()
