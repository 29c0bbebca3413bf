"""Accuracy by grouped cross-validation: `make bench-accuracy`, `python -m benchmarks.accuracy [OPTIONS] [KEY=VALUE…]`.

A configuration (params.yaml's defaults, or --params, with the given changes such as `train.epochs=40` or
`model.fusion=gram`) is trained anew for every fold and asked once about the videos that were left out. Part of the
training videos, by group, is kept aside for early stopping. A fold that is done is kept under the digest of its
configuration and the git commit: a killed run goes on. Finished runs go to benchmarks/results/accuracy.json and .png.

Settings are chosen with --inner: the outer fold is then left out altogether, and the videos kept aside are judged
(benchmarks/results/ablation.json). A figure is published from one run without it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from benchmarks import common
from benchmarks.accuracy.figures import plot, summarise
from benchmarks.common import REPOSITORY, SHARED, table
from sora.config import PRESETS, Settings, parse
from sora.core import provenance
from sora.core.errors import InputError, SoraError
from sora.core.files import atomic
from sora.core.progress import bar, say
from sora.core.records import Split
from sora.dataset import folds, manifest, splits
from sora.learning import crossval
from sora.model.bank import Bank
from sora.store import building
from sora.store.derived import derive
from sora.store.shards import ShardSet

CACHE = REPOSITORY / ".sora" / "accuracy"


@dataclass(frozen=True)
class Protocol:
    """How a set is divided. `seeds` repeat it: other folds (where they are drawn), other weights, other order."""

    name: str
    data: Path
    group_pattern: str | None = None
    folds: int = 5  # 0: one a group
    random: bool = False  # folds that divide groups: what they give is too good
    seeds: int = 3
    validation: float = 0.2  # share of the training videos, by group, for early stopping; 0: watch the training loss
    inner: float = 0.2  # the same with --inner, which must have some
    known: tuple[tuple[str, float], ...] = ()  # figures of others by the same protocol


_FIGHTS = Protocol("fights300", SHARED / "fights300", known=(("flow + mean image + SVM", 0.71), ("frozen Lite0", 0.73)))
SETS = {
    one.name: one
    for one in (
        _FIGHTS,
        replace(_FIGHTS, name="fights300-random", random=True, known=(("optical flow + SVM", 0.70),)),
        # Two people are left to train on: to keep one of them aside would cost half of all that there is.
        Protocol("steps27", SHARED / "steps27", r"(P\d+)T\d", folds=0, seeds=5, validation=0.0, inner=0.5,
                 known=(("optical flow + SVM", 0.89),)),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A set, decoded: its usable videos (manifest rows with their `unit`) and their clips."""

    protocol: Protocol
    settings: Settings
    videos: pd.DataFrame
    shards: Path
    features: Path | None  # the bank, for a model that reads one


def settings_of(params: Path | None, changes: list[str]) -> Settings:
    """The defaults, or those of a file, with changes `section.key=value` (the value is YAML).

    Raises:
        SettingsError: an unknown key, or a value out of its range.
        InputError: a change that has another form.
    """
    values = Settings().to_dict() if params is None else parse(params.read_text("utf-8"), str(params)).to_dict()
    for change in changes:
        key, equals, text = change.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and section in values):
            raise InputError(f"{change!r} is no change", fix="write section.key=value, as in train.epochs=40")
        # A preset fills in what is not given: nothing of the section may be.
        before = {} if key == "model.preset" else values[section]
        values[section] = {**before, name: yaml.safe_load(text)}
        if key == "model.preset" and text in PRESETS:
            values["clip"] = PRESETS[text].clip.to_dict()
    return parse(yaml.safe_dump(values), "the changed settings")


def prepare(protocol: Protocol, settings: Settings, cache: Path) -> Prepared:
    """Decodes the set once, and its clips once a clip spec, by the same functions as the pipeline's stages."""
    values = settings.to_dict()
    values["split"]["group_pattern"] = protocol.group_pattern
    values["classes"] = []
    settings = parse(yaml.safe_dump(values))
    home = cache / "sets" / protocol.name
    home.mkdir(parents=True, exist_ok=True)
    stored = home / "manifest.parquet"
    with bar("Decoding") as update:
        previous = manifest.read(stored) if stored.exists() else None
        rows = manifest.build(
            protocol.data, settings, previous=previous, journal=home / "manifest.jsonl", progress=update
        )
    manifest.write(rows, stored)
    (home / "manifest.jsonl").unlink(missing_ok=True)
    # The same bytes under two labels are no use to anyone; of other copies the first by path counts.
    usable = rows[rows["error"].isna()]
    usable = usable[usable.groupby("sha256")["label"].transform("nunique") == 1].drop_duplicates("sha256")
    usable = usable.sort_values("sha256", ignore_index=True)
    values["classes"] = sorted(usable["label"].unique())
    settings = parse(yaml.safe_dump(values))
    place = home / f"clips-{crossval.digest(settings.clip.spec().to_dict())}"
    with bar("Clips") as update:
        building.build(usable, (), protocol.data, place, settings.clip.spec(), progress=update)
    features = None
    if settings.model.bank:
        made = ShardSet.open(place)
        bank = Bank(settings.model.backbone, made.spec)
        features = place.with_name(f"features-{settings.model.backbone}-{place.name}")
        with bar("Features") as update:
            derive(made, features, bank.tensors, provenance.features(bank.backbone), bank.compute, progress=update)
    return Prepared(protocol, settings, usable.assign(unit=_units(protocol, settings, usable)), place, features)


def _units(protocol: Protocol, settings: Settings, videos: pd.DataFrame) -> Any:
    if protocol.folds:
        return splits.units(videos, settings.validate_.near_duplicate_bits)
    if videos["group"].isna().any():
        raise InputError(f"{protocol.name}: a video without a group", fix="give --group-pattern, or folds")
    return pd.factorize(videos["group"], sort=True)[0]


@dataclass(frozen=True)
class Fold:
    """One training: `table` has the columns of `sora.dataset.table`; without `test` rows where `inner`."""

    number: int
    seed: int
    settings: Settings
    table: pd.DataFrame
    key: str


def plan(prepared: Prepared, commit: str, *, inner: bool) -> Iterator[Fold]:
    """All folds of all seeds."""
    protocol, videos = prepared.protocol, prepared.videos
    labels, units = videos["label"].to_numpy(), videos["unit"].to_numpy()
    bound = videos.index.to_numpy() if protocol.random else units
    for seed in range(protocol.seeds):
        count = protocol.folds or videos["unit"].nunique()
        outer = folds.stratified(labels, bound, count, seed) if protocol.folds else units
        settings = prepared.settings.model_copy(
            update={"train": prepared.settings.train.model_copy(update={"seed": seed})}
        )
        for number in range(count):
            train = outer != number
            share = protocol.inner if inner else protocol.validation
            aside = folds.with_validation(train, labels, bound, share, seed)
            split = pd.Series("train", index=videos.index).mask(aside, "val").mask(~train, "test")
            rows = videos[["sha256", "path", "label", "group", "brightness", "duration", "codec", "unit"]].assign(
                split=split
            )
            if inner:
                rows = rows[rows["split"] != "test"]
                if not aside.any():
                    raise InputError(f"{protocol.name} has too few groups for --inner", fix="add groups, or seeds")
            what = {
                "configuration": crossval.configuration(settings),
                "table": rows[["sha256", "label", "split"]].to_csv(index=False),
                "commit": commit,
                "inner": inner,
            }
            yield Fold(number, seed, settings, rows, f"{protocol.name}-{seed}-{number}-{crossval.digest(what)}")


def run(prepared: Prepared, plans: list[Fold], cache: Path, *, inner: bool) -> list[dict[str, Any]]:
    """Trains what is not done yet; one entry a fold: that of `crossval.answers`, with seed and fold."""
    epochs = prepared.settings.train.epochs
    results = []
    with bar("Folds") as update:
        for done, fold in enumerate(plans):
            where = f"fold {done + 1} of {len(plans)} (seed {fold.seed})"

            def show(event: dict[str, Any], done: int = done, where: str = where) -> None:
                if event["event"] == "epoch":
                    update(done * epochs + event["epoch"], len(plans) * epochs, where)
                elif event["event"] == "note":
                    say(event["message"])

            judged: Split = "val" if inner else "test"
            folder = cache / "folds" / fold.key
            answered = crossval.answers(
                folder, prepared.shards, fold.table, fold.settings, judged=judged, features=prepared.features,
                on_event=show,
            )  # fmt: skip
            update((done + 1) * epochs, len(plans) * epochs, where)
            results.append({**answered, "seed": fold.seed, "fold": fold.number})
    return results


def store(entry: dict[str, Any], out: Path, name: str) -> list[dict[str, Any]]:
    """Puts the run's entry into OUT/NAME.json in place of an earlier one of its name; returns all."""
    file = out / f"{name}.json"
    entries = json.loads(file.read_text("utf-8"))["result"] if file.exists() else []
    entries = [other for other in entries if other["name"] != entry["name"]] + [entry]
    common.write(name, entries, out)
    with atomic(out / f"{name}.png") as picture:
        picture.write(plot(entries))
    return entries


def measure(protocol: Protocol, settings: Settings, given: argparse.Namespace, commit: str) -> dict[str, Any] | None:
    """One set, from its files to its entry; None when --limit-folds left some undone (with --inner: an entry)."""
    prepared = prepare(protocol, settings, given.cache)
    plans = list(plan(prepared, commit, inner=given.inner))
    chosen = plans[: given.limit_folds]
    results = run(prepared, chosen, given.cache, inner=given.inner)
    entry = {
        "name": " ".join(filter(None, [protocol.name, given.name])),
        "set": protocol.name,
        "protocol": _in_words(protocol, inner=given.inner),
        "leaks": protocol.random,
        "commit": commit,
        "changes": given.changes,
        "configuration": crossval.configuration(prepared.settings),
        "folds_of": len(plans),
        "known": [list(known) for known in protocol.known],
        **summarise(results, prepared.videos),
    }
    if len(chosen) < len(plans) and not given.inner:
        say(f"{protocol.name}: {len(chosen)} of {len(plans)} folds are done; without --limit-folds the rest follows")
        return None
    return entry


def _in_words(protocol: Protocol, *, inner: bool) -> str:
    kind = "random folds (they leak)" if protocol.random else "grouped folds"
    outer = f"{protocol.folds} {kind}" if protocol.folds else "leave one group out"
    judged = "; judged on inner validation, the outer fold left out" if inner else ""
    return f"{outer}, {protocol.seeds} seeds{judged}"


def main(arguments: list[str] | None = None) -> int:
    given = _options(arguments)
    try:
        commit = common.commit(REPOSITORY)
        settings = settings_of(given.params, given.changes)
        protocols = [SETS[name] for name in given.set]
        if given.data:
            name = given.data.resolve().name
            protocols = [Protocol(name, given.data.resolve(), given.group_pattern, random=given.random)]
        entries: list[dict[str, Any]] = []
        for protocol in protocols:
            changed = {"folds": given.folds, "seeds": given.seeds}
            protocol = replace(protocol, **{key: value for key, value in changed.items() if value is not None})
            entry = measure(protocol, settings, given, commit)
            if entry:
                entries = store(entry, given.out, "ablation" if given.inner else "accuracy")
    except SoraError as error:
        say(f"bench-accuracy: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        return 130
    if entries:
        shown = ("name", "protocol", "accuracy", "spread", "low", "high", "folds", "commit")
        table("Accuracy", [{key: entry[key] for key in shown} for entry in entries])
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--set", action="append", choices=list(SETS), help="[default: all, one after the other]")
    options.add_argument("--data", type=Path, help="a folder of labelled videos instead of a set")
    options.add_argument("--group-pattern", help="with --data: see split.group_pattern")
    options.add_argument("--random", action="store_true", help="with --data: folds that divide groups")
    options.add_argument("--params", type=Path, help="a params.yaml to start from [default: the defaults]")
    options.add_argument("--name", default="", help="of this configuration, beside the set's name")
    options.add_argument("--folds", type=int, help="0: leave one group out")
    options.add_argument("--seeds", type=int)
    options.add_argument("--limit-folds", type=int, help="only so many folds, of the first seed first")
    options.add_argument("--inner", action="store_true", help="judge on inner validation, for choosing settings")
    options.add_argument("--cache", type=Path, default=CACHE, help="clips and finished folds [default: %(default)s]")
    options.add_argument("--out", type=Path, default=common.RESULTS, help="[default: %(default)s]")
    options.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="as in train.epochs=40")
    given = options.parse_args(arguments)
    given.set = given.set or list(SETS)
    return given


if __name__ == "__main__":
    sys.exit(main())
