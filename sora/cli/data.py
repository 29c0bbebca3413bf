"""The labels in data/: review of corrections, audit."""

from __future__ import annotations

import click

from sora.cli.common import common_options, current_project, json_option, print_json
from sora.core.progress import echo, one_line


@click.group()
def data() -> None:
    """Maintain data/: review corrections, and find labels that look wrong."""


@data.command()
@click.option("--accept", metavar="ID", help="Move this clip into data/ (its id, or the first 8 digits).")
@click.option("--reject", metavar="ID", help="Remove this clip.")
@click.option("--label", help="With --accept: the right class, if the sender's label is wrong.")
@json_option
@common_options
def review(accept: str | None, reject: str | None, label: str | None, as_json: bool) -> None:
    """List the inbox of corrections, accept one into data/, or reject one."""
    from sora.dataset.corrections import NEXT, Inbox

    if (accept and reject) or (label and not accept):
        raise click.UsageError("give --accept ID [--label CLASS], or --reject ID, or neither to list")
    project = current_project()
    limits = project.settings().serve
    inbox = Inbox(project, limits.inbox_files, limits.inbox_bytes)
    if accept or reject:
        entry = inbox.find(accept or reject or "")
        answer = {"id": entry.id}
        if accept:
            answer |= {"path": inbox.accept(entry.id, label).as_posix(), "next": NEXT}
        else:
            inbox.reject(entry.id)
        if as_json:
            print_json(answer)
        else:
            echo(
                f"data/{one_line(answer['path'])}: {NEXT}"
                if accept
                else f"rejected: {one_line(entry.filename)} was removed"
            )
        return
    entries, known = inbox.entries(), inbox.sources()
    if as_json:
        print_json(
            [
                {**entry.to_dict(), "sent_by": [one.to_dict() for one in inbox.sent_by(entry, known)]}
                for entry in entries
            ]
        )
        return
    for entry in entries:
        echo(
            f"{entry.id[:12]}  {entry.label}  (version {entry.version}: {entry.predicted})  {one_line(entry.filename)}"
        )
        for source in inbox.sent_by(entry, known):
            often = "refused often:" if source.often_refused else "sent by"
            colour = "yellow" if source.often_refused else None
            echo(one_line(str(source)), mark=f"              {often}", colour=colour)
        echo(f"              {inbox.file(entry)}", err=True)
    if not entries:
        echo("nothing is waiting for review")


@data.command()
@click.option("--folds", default=5, show_default=True, type=click.IntRange(2, 100), help="Models to train.")
@json_option
@common_options
def audit(folds: int, as_json: bool) -> None:
    """Rank videos that are probably mislabelled, using models that have not seen them."""
    from sora.core.progress import bar
    from sora.learning import audit as auditing

    with bar("Auditing") as update:
        result = auditing.audit(current_project(), folds=folds, progress=update)
    if as_json:
        print_json(result)
        return
    from rich.table import Table

    from sora.core.progress import console
    from sora.core.progress import markup as escape

    suspects = [finding for finding in result["findings"] if finding["suspect"]]
    table = Table("video", "label", "looks like", "margin")
    for finding in suspects[:20]:
        looks = f"{finding['suggested']} ({finding['suggested_probability']:.0%})"
        label = f"{finding['label']} ({finding['probability']:.0%})"
        table.add_row(escape(finding["path"]), escape(label), escape(looks), f"{finding['margin']:.2f}")
    if suspects:
        console().print(table)
    echo(
        f"{result['suspects']} of {result['videos']} labels are suspect; out-of-fold accuracy {result['accuracy']:.0%}"
    )
    echo(f"  {result['page']}", err=True)
