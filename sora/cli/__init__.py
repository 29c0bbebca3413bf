"""The front door: argument → call → exit code. Heavy imports stand inside the verb that needs them.

Exit codes: 0 done; 1 the answer is no; 2 bad usage or input; 3 a server, disk or child process failed; 130 Ctrl-C.
Verbs that report take `--json` and then print one JSON document on standard output and nothing else there.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sora import __version__
from sora.core.progress import echo, json_text, one_line

if TYPE_CHECKING:
    from sora.config import Project
    from sora.core.errors import SoraError

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")


def _common(command: Any) -> Any:
    """The options that every verb takes."""

    def keep(name: str) -> Any:
        def callback(ctx: click.Context, _: click.Parameter, value: Any) -> None:
            if value:
                ctx.find_root().meta[f"sora.{name}"] = value

        return callback

    command = click.option(
        "--debug", is_flag=True, expose_value=False, callback=keep("debug"), help="Show tracebacks."
    )(command)
    return click.option(
        "--project",
        type=click.Path(path_type=Path, file_okay=False),
        expose_value=False,
        callback=keep("project"),
        help="The project's folder [default: the nearest params.yaml upwards].",
    )(command)


def _project() -> Project:
    from sora.config import find_project

    given = click.get_current_context().find_root().meta.get("sora.project")
    return find_project(given or Path.cwd())


def _print_json(value: Any) -> None:
    echo(json_text(json.dumps(value, ensure_ascii=False, allow_nan=False)))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sora")
@_common
def cli() -> None:
    """A folder of labelled videos becomes a served video classifier that retrains itself every night."""


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="A folder of labelled videos.")
@click.option("--multilabel", is_flag=True, help="A video may have several labels: labels.csv joins them by |.")
@json_option
@_common
def init(directory: Path, data: Path, multilabel: bool, as_json: bool) -> None:
    """Make a project in DIR from a folder of labelled videos (copied, never altered)."""
    from sora.core.progress import bar
    from sora.operations import project

    with bar("Copying") as update:
        made = project.init(directory, data, multilabel=multilabel, progress=update)
    if as_json:
        _print_json(made)
    else:
        echo(f"{made['videos']} videos of {len(made['classes'])} classes: {', '.join(made['classes'])}")
        echo(f"next: cd {made['project']} && sora check && sora run")


@cli.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where the report goes when FOLDER is no project.")
@json_option
@_common
def check(folder: Path | None, out: Path | None, as_json: bool) -> None:
    """Decode every video, validate, and write the report and Data Docs."""
    from sora.core.progress import bar
    from sora.dataset import check as checking

    with bar("Decoding") as update:
        report, place = checking.check(folder if folder is not None else _project(), out=out, progress=update)
    if as_json:
        _print_json(report.contract())
    else:
        checking.show(report, place)
    if not report.ok:
        sys.exit(1)


@cli.command()
@click.option("--force", is_flag=True, help="Train and judge although nothing changed; promote on little evidence.")
@json_option
@_common
def run(force: bool, as_json: bool) -> None:
    """Run the nightly flow once, here and now."""
    from flows.here import run_here

    result = run_here(_project(), force=force)
    if as_json:
        _print_json(result)
        return
    version = f" version {result['version']}" if result["version"] is not None else ""
    echo(f"{result['outcome']}{version}", bold=True)
    for reason in result["reasons"]:
        echo(f"  {reason}")
    shown = {k: v for k, v in result["metrics"].items() if k in ("test/accuracy", "test/macro_f1", "test/ece")}
    if shown:
        echo("  " + "  ".join(f"{name} {value:.3f}" for name, value in shown.items()))
    for place in result.get("pages", []):
        echo(f"  {place}", err=True)


@cli.command()
@json_option
@_common
def models(as_json: bool) -> None:
    """Every version: aliases, metrics, data version, when and why."""
    from sora.runtime import lifecycle

    versions = [version.to_dict() for version in lifecycle.models(_project())]
    if as_json:
        keys = ("version", "aliases", "metrics", "data_version", "created", "decision", "reasons")
        _print_json([{key: version[key] for key in keys} for version in versions])
        return
    from rich.table import Table

    from sora.core.progress import console as make_console
    from sora.core.progress import markup as escape

    console = make_console()
    table = Table("version", "alias", "accuracy", "macro F1", "data", "created", "decision", box=None, pad_edge=False)
    for version in versions:
        metrics = version["metrics"]
        table.add_row(
            str(version["version"]),
            ", ".join(version["aliases"]),
            *(f"{metrics[name]:.3f}" if name in metrics else "" for name in ("test/accuracy", "test/macro_f1")),
            version["data_version"][:8],
            version["created"][:16].replace("T", " "),
            version["decision"],
        )
    console.print(table if versions else "no version yet: `sora run` makes the first")
    for version in versions:
        # Reasons are sentences: beside the figures they would have a column a word wide.
        if version["reasons"]:
            console.print(f"\nversion {version['version']}: {escape(version['decision'])}", soft_wrap=True)
        for reason in version["reasons"]:
            console.print(f"  {escape(reason)}", soft_wrap=True)


@cli.group()
@_common
def model() -> None:
    """The network: what it is made of and what it costs."""


@model.command()
@click.argument("preset", required=False)
@click.option("--classes", type=click.IntRange(min=2), help="[default: the project's, or 2 with PRESET]")
@click.option("--batch", type=click.IntRange(min=1), help="For the memory [default: train.batch].")
@json_option
@_common
def describe(preset: str | None, classes: int | None, batch: int | None, as_json: bool) -> None:
    """Layers, shapes, parameters, FLOPs a clip and memory: of the project's model, or of PRESET at its own clips."""
    from sora.model import describe as describing

    settings = describing.of_preset(preset) if preset else _project().settings()
    found = describing.describe(settings, classes=classes, batch=batch)
    if as_json:
        _print_json(found)
    else:
        echo(describing.draw(found))


@cli.command()
@click.argument("version", type=click.IntRange(min=1))
@json_option
@_common
def promote(version: int, as_json: bool) -> None:
    """Make VERSION the champion."""
    from sora.runtime import lifecycle

    _moved(lifecycle.promote(_project(), version), as_json)


@cli.command()
@click.option("--to", type=click.IntRange(min=1), help="A version that was champion before.")
@json_option
@_common
def rollback(to: int | None, as_json: bool) -> None:
    """Make the champion before this one the champion again."""
    from sora.runtime import lifecycle

    _moved(lifecycle.rollback(_project(), to), as_json)


def _moved(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(result)
    else:
        echo(f"champion: version {result['champion']}, previous: {result['previous'] or 'none'}")


@cli.command()
@click.argument("version", type=click.IntRange(min=1))
@json_option
@_common
def reproduce(version: int, as_json: bool) -> None:
    """Restore VERSION's data, parameters and splits, evaluate it again and compare."""
    from sora.runtime import lifecycle

    result = lifecycle.reproduce(_project(), version)
    if as_json:
        _print_json(result)
    else:
        echo(f"version {version}: {'matches' if result['matches'] else 'does NOT match'} what was recorded")
        for name, recorded in sorted(result["recorded"].items()):
            echo(f"  {name}: recorded {recorded:.4f}, now {result['metrics'].get(name, float('nan')):.4f}")
        for note in result.get("notes", []):
            echo(f"  {note}")
    if not result["matches"]:
        sys.exit(1)


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
@_common
def predict(files: tuple[Path, ...], as_json: bool) -> None:
    """The champion's answer for video FILEs."""
    from sora.runtime import lifecycle

    answers = lifecycle.predict(_project(), list(files))
    if as_json:
        _print_json(answers)
    for answer in answers:
        if "error" in answer:
            echo(f"{one_line(answer['path'])}: {answer['error']}", err=True)
        elif not as_json:
            echo(f"{one_line(answer['path'])}: {_answered(answer)}, version {answer['version']})")
    if any("error" in answer for answer in answers):
        sys.exit(2)


def _answered(answer: dict[str, Any]) -> str:
    """The labels with their shares, up to the last bracket: `bright (93%), left (88%`."""
    word = "unsure, at best " if answer.get("unsure") else ""
    if answer.get("labels") == []:
        word = "none of the classes, at best "
    names = answer.get("labels") or [answer["label"]]
    return word + "), ".join(f"{name} ({answer['probabilities'][name]:.0%}" for name in names)


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="A .npy file: (files, width) float32.")
@json_option
@_common
def embed(files: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """The champion's representation of video FILEs: a vector each."""
    from sora.runtime import representation

    if (out is None) != as_json or (out is not None and out.suffix != ".npy"):
        raise click.UsageError("give either --json, or --out with a name that ends in .npy")
    answers = representation.embed(_project(), list(files))
    failed = [answer for answer in answers if "error" in answer]
    if as_json:
        _print_json(answers)
    elif out is not None and not failed:  # a row a file: with one missing, rows would stand for the wrong files
        representation.write(out, answers)
        echo(f"{out}: {len(answers)} vectors of version {answers[0]['version']}")
    for answer in failed:
        echo(f"{one_line(answer['path'])}: {answer['error']}", err=True)
    if failed:
        if out is not None:
            echo(f"{out} was not written: leave these files out", err=True)
        sys.exit(2)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-n", "count", type=click.IntRange(1, 1000), default=5, show_default=True, help="Neighbours.")
@json_option
@_common
def similar(file: Path, count: int, as_json: bool) -> None:
    """The videos nearest to FILE among those that the champion learned from."""
    from sora.core.progress import bar
    from sora.runtime import representation

    with bar("Embedding") as update:
        found = representation.similar(_project(), file, count=count, progress=update)
    if as_json:
        _print_json(found)
        return
    for neighbour in found["neighbours"]:
        echo(f"{neighbour['similarity']:.3f}  {one_line(neighbour['label'])}  {one_line(neighbour['path'])}")


@cli.command()
@click.option("--host", help="[default: serve.host of params.yaml, 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="[default: serve.port of params.yaml, 8000]")
@_common
def serve(host: str | None, port: int | None) -> None:
    """Serve the champion over HTTP; it follows the alias without a restart."""
    from sora.serving.app import serve as serve_project

    serve_project(_project(), host, port)


@cli.group()
def token() -> None:
    """Bearer tokens of the API; a running server follows them."""


@token.command("add")
@click.argument("name")
@click.option("--review", is_flag=True, help="It may also review corrections: what is accepted is learned from.")
@json_option
@_common
def token_add(name: str, review: bool, as_json: bool) -> None:
    """Make a token for NAME and print it: once, since only its hash is kept."""
    from sora.serving.tokens import TokenFile

    made = TokenFile(_project().tokens).add(name, review=review)
    if as_json:
        _print_json({"name": name, "token": made, "review": review})
    else:
        echo(made)


@token.command("list")
@json_option
@_common
def token_list(as_json: bool) -> None:
    """The tokens' names, when they were made, and which may review corrections."""
    from sora.serving.tokens import TokenFile

    known = TokenFile(_project().tokens).tokens()
    if as_json:
        _print_json([{"name": one.name, "created": one.created, "review": one.review} for one in known])
        return
    for one in known:
        echo(f"{one.created[:16].replace('T', ' ')}  {one.name}{'  (may review)' if one.review else ''}")


@token.command("revoke")
@click.argument("name")
@json_option
@_common
def token_revoke(name: str, as_json: bool) -> None:
    """Take the rights of NAME's token."""
    from sora.serving.tokens import TokenFile

    file = TokenFile(_project().tokens)
    left = file.revoke(name)
    if as_json:
        _print_json({"name": name, "left": left})
    elif not left:
        echo(f"no token is left, so nobody may call; remove {file.path} to serve this machine without tokens")


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--prefect-port", type=click.IntRange(0, 65535), default=4200, show_default=True)
@click.option("--mlflow-port", type=click.IntRange(0, 65535), default=5000, show_default=True)
@click.option("--api-port", type=click.IntRange(0, 65535), help="[default: serve.port of params.yaml, 8000]")
@_common
def up(host: str, prefect_port: int, mlflow_port: int, api_port: int | None) -> None:
    """All of it on one machine: Prefect, MLflow, a worker with the nightly schedule, the API."""
    from sora.cli.supervisor import up as start_all

    start_all(_project(), host=host, prefect_port=prefect_port, mlflow_port=mlflow_port, api_port=api_port)


@cli.command()
@json_option
@_common
def doctor(as_json: bool) -> None:
    """What is installed, reachable, running, and how to fix what is not."""
    from sora.core.errors import SettingsError
    from sora.operations import doctor as doctoring

    try:
        project: Project | None = _project()
    except SettingsError:
        project = None
    result = doctoring.doctor(project)
    if as_json:
        _print_json(result)
    else:
        for found in result["checks"]:
            mark, colour = ("ok  ", "green") if found["ok"] else ("FIX", "red")
            echo(f"{found['name']}: {found['detail']}", mark=mark, colour=colour)
            if not found["ok"] and found["fix"]:
                echo(f"       → {found['fix']}")


@cli.group()
def splits() -> None:
    """Which video is for training, validation and test: the ledger splits.csv."""


@splits.command("restore")
@click.option("--from", "version", type=click.IntRange(min=1), help="What VERSION recorded [default: the last judged].")
@json_option
@_common
def splits_restore(version: int | None, as_json: bool) -> None:
    """Bring lost or changed rows back as a judged run recorded them; new rows stay where they contradict nothing."""
    from dataclasses import asdict

    from sora.runtime import lifecycle

    done = lifecycle.restore_splits(_project(), version)
    if as_json:
        _print_json(asdict(done))
        return
    echo(
        f"as {done.source} recorded: {done.returned} rows came back, {done.corrected} were corrected, "
        f"{done.kept} newer ones stay, {done.dropped} were dropped (the next run deals those); {done.rows} in all"
    )
    if done.copy:
        echo(f"  what stood there before: {done.copy}", err=True)


@cli.group()
def data() -> None:
    """What data/ is made of: corrections of labels, and labels that look wrong."""


@data.command()
@click.option("--accept", metavar="ID", help="Take this clip into data/ (its id, or the first 8 digits of it).")
@click.option("--reject", metavar="ID", help="Remove this clip.")
@click.option("--label", help="With --accept: the right class, where it is not what was said.")
@json_option
@_common
def review(accept: str | None, reject: str | None, label: str | None, as_json: bool) -> None:
    """The inbox of corrections: list it, accept into data/, or reject."""
    from sora.dataset.corrections import NEXT, Inbox

    if (accept and reject) or (label and not accept):
        raise click.UsageError("give --accept ID [--label CLASS], or --reject ID, or neither to list")
    project = _project()
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
            _print_json(answer)
        else:
            echo(
                f"data/{one_line(answer['path'])}: {NEXT}"
                if accept
                else f"rejected: {one_line(entry.filename)} is removed"
            )
        return
    entries, known = inbox.entries(), inbox.sources()
    if as_json:
        _print_json(
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
            echo(
                one_line(str(source)), mark=f"              {often}", colour="yellow" if source.often_refused else None
            )
        echo(f"              {inbox.file(entry)}", err=True)
    if not entries:
        echo("nothing waits for review")


@data.command()
@click.option("--folds", default=5, show_default=True, type=click.IntRange(2, 100), help="Models to train.")
@json_option
@_common
def audit(folds: int, as_json: bool) -> None:
    """Rank videos that are probably mislabelled, by models that have not seen them."""
    from sora.core.progress import bar
    from sora.learning import audit as auditing

    with bar("Auditing") as update:
        result = auditing.audit(_project(), folds=folds, progress=update)
    if as_json:
        _print_json(result)
        return
    from rich.table import Table

    from sora.core.progress import console
    from sora.core.progress import markup as escape

    suspects = [found for found in result["findings"] if found["suspect"]]
    table = Table("video", "label", "looks like", "margin")
    for found in suspects[:20]:
        looks = f"{found['suggested']} ({found['suggested_probability']:.0%})"
        label = f"{found['label']} ({found['probability']:.0%})"
        table.add_row(escape(found["path"]), escape(label), escape(looks), f"{found['margin']:.2f}")
    if suspects:
        console().print(table)
    echo(
        f"{result['suspects']} of {result['videos']} labels are suspect; out-of-fold accuracy {result['accuracy']:.0%}"
    )
    echo(f"  {result['page']}", err=True)


@cli.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--keep", default=10, show_default=True, type=click.IntRange(min=1), help="Versions to keep whole.")
@json_option
@_common
def gc(dry_run: bool, keep: int, as_json: bool) -> None:
    """Free what no served or recent version needs: DVC cache, old runs and versions, work folders, logs."""
    from sora.runtime import lifecycle

    result = lifecycle.gc(_project(), keep=keep, dry_run=dry_run)
    if as_json:
        _print_json(result)
        return
    for item in result["items"]:
        echo(f"{item['bytes']:>14,}  {item['what']}  ({item['why']})")
    echo(f"{result['bytes']:>14,}  bytes {'would be' if dry_run else 'were'} freed")


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--without-data", is_flag=True, help="Leave the videos and clips out: DVC's remote must have them.")
@click.option("--keep", type=click.IntRange(min=1), help="Recent versions whose data go along [default: 10].")
@json_option
@_common
def backup(file: Path, without_data: bool, keep: int | None, as_json: bool) -> None:
    """Write all of the project into the new FILE, while servers and runs go on. It holds secrets: keep it so."""
    from dataclasses import asdict

    from sora.core.progress import bar
    from sora.operations.backup import describe
    from sora.runtime import lifecycle

    with bar("Backing up") as update:
        made = lifecycle.backup(_project(), file, keep=keep, data=not without_data, progress=update)
    if as_json:
        _print_json(asdict(made))
        return
    for line in describe(made):
        echo(line)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@json_option
@_common
def restore(file: Path, directory: Path, as_json: bool) -> None:
    """Make the project that the backup FILE holds in the new or empty folder DIR."""
    from dataclasses import asdict

    from sora.core.progress import bar
    from sora.operations import restore as restoring

    with bar("Restoring") as update:
        restored = restoring.restore(file, directory, progress=update)
    if as_json:
        _print_json(asdict(restored))
        return
    for line in restoring.describe(restored):
        echo(line)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs the verb and ends the process with its exit code."""
    from sora.core.sandbox import hide_memory

    arguments = sys.argv[1:] if arguments is None else arguments
    hide_memory()  # this process holds tokens, and so do many of those that it works through
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    from sora.core.errors import SoraError

    debug = "--debug" in arguments
    try:
        cli.main(args=arguments, prog_name="sora", standalone_mode=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 3
    except (KeyboardInterrupt, click.Abort):
        echo("stopped; run the same command again to go on", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SoraError as error:
        if debug:
            raise
        echo(f"sora: {_with_disk(error, arguments)}", err=True)
        return error.exit_code
    except BrokenPipeError:
        return 0
    except Exception as error:
        if debug:
            raise
        echo(f"sora: {_foreign(error, arguments)}", err=True)
        return 3
    return 0


def _with_disk(error: SoraError, arguments: list[str]) -> str:
    """The error's words; where a server or a child process failed and the disk is full or read-only, also that."""
    from sora.core.errors import DiskFull, ReadOnly, ServiceError
    from sora.core.files import disk_failure

    if not isinstance(error, ServiceError) or isinstance(error, DiskFull | ReadOnly):
        return str(error)
    disk = disk_failure(_place(arguments), error.message)
    return f"{error.message}\n  {disk}" if disk else str(error)


def _foreign(error: Exception, arguments: list[str]) -> str:
    """Words for an exception that no seam translated."""
    from sora.core.files import disk_failure

    # Libraries wrap what the system said: its words, or its error, are somewhere in the chain.
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    said = "\n".join(str(one) for one in chain)
    disk = disk_failure(_place(arguments), said)
    if disk is not None:
        return f"{disk.message} ({type(error).__name__}: {error})\n  fix: {disk.fix}"
    if isinstance(error, PermissionError):
        return f"not allowed: {error}\n  fix: make the folder writable, or use another one"
    return f"{type(error).__name__}: {error}\n  fix: run again with --debug and report the traceback"


def _place(arguments: list[str]) -> Path:
    """The folder that a verb wrote to: the project's, or this one."""
    given = [after for name, after in pairwise(arguments) if name == "--project"]
    given += [name.removeprefix("--project=") for name in arguments if name.startswith("--project=")]
    return Path(given[0] if given else ".").absolute()


if __name__ == "__main__":
    main()
