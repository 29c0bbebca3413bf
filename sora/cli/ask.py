"""Questions to the champion: predict, embed, similar."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sora.cli.common import common_options, current_project, json_option, print_json
from sora.core.progress import echo, one_line


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
@common_options
def predict(files: tuple[Path, ...], as_json: bool) -> None:
    """Print the champion's answer for each video FILE."""
    from sora.runtime import lifecycle

    answers = lifecycle.predict(current_project(), list(files))
    if as_json:
        print_json(answers)
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


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="A .npy file: (files, width) float32.")
@json_option
@common_options
def embed(files: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Print the champion's representation of each video FILE: one vector per file."""
    from sora.runtime import representation

    if (out is None) != as_json or (out is not None and out.suffix != ".npy"):
        raise click.UsageError("give either --json, or --out with a name that ends in .npy")
    answers = representation.embed(current_project(), list(files))
    failed = [answer for answer in answers if "error" in answer]
    if as_json:
        print_json(answers)
    elif out is not None and not failed:  # one row per file: with one missing, rows would belong to the wrong files
        representation.write(out, answers)
        echo(f"{out}: {len(answers)} vectors of version {answers[0]['version']}")
    for answer in failed:
        echo(f"{one_line(answer['path'])}: {answer['error']}", err=True)
    if failed:
        if out is not None:
            echo(f"{out} was not written: run again without these files", err=True)
        sys.exit(2)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-n", "count", type=click.IntRange(1, 1000), default=5, show_default=True, help="Neighbours.")
@json_option
@common_options
def similar(file: Path, count: int, as_json: bool) -> None:
    """Find the videos nearest to FILE among those that the champion learned from."""
    from sora.core.progress import bar
    from sora.runtime import representation

    with bar("Embedding") as update:
        answer = representation.similar(current_project(), file, count=count, progress=update)
    if as_json:
        print_json(answer)
        return
    for neighbour in answer["neighbours"]:
        echo(f"{neighbour['similarity']:.3f}  {one_line(neighbour['label'])}  {one_line(neighbour['path'])}")
