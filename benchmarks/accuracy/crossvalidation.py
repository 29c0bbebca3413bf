"""Accuracy by grouped cross-validation: `make bench-accuracy`, `python -m benchmarks.accuracy [OPTIONS] [KEY=VALUE…]`.

A configuration (params.yaml's defaults, or --params, with the given changes such as `train.epochs=40` or
`model.fusion=gram`) is trained anew for every fold and asked once about the videos that were left out. Part of the
training videos, by group, is kept aside for early stopping. --baseline asks a reference the same questions.

A finished fold is a file in benchmarks/results/folds (see `benchmarks.accuracy.foldfiles`), to be committed: a run
computes what is missing, `--next N` at most N folds of it. A killed training goes on after its last epoch, at the same
commit (.sora/accuracy). accuracy.json and .png in benchmarks/results hold what the folds there say, and how many of
them are missing.

Settings are chosen with --inner: the outer fold is then left out altogether, and the videos kept aside are judged
(benchmarks/results/ablation.json). A figure is published from one run without it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from benchmarks import common
from benchmarks.accuracy import baselines, foldfiles, motions
from benchmarks.accuracy.baselines import BASELINES
from benchmarks.accuracy.figures import label_of, store, summarise
from benchmarks.accuracy.foldfiles import FoldRecord
from benchmarks.common import REPOSITORY, SHARED, table
from sora.config import PRESETS, Settings, parse
from sora.core import provenance
from sora.core.errors import InputError, SoraError
from sora.core.processes import Emit
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
    data: Path  # of a set with `make` nothing
    group_pattern: str | None = None
    folds: int = 5  # 0: one a group
    random: bool = False  # folds that divide groups: what they give is too good
    seeds: int = 3
    validation: float = 0.2  # share of the training videos, by group, for early stopping; 0: watch the training loss
    inner: float = 0.2  # the same with --inner, which must have some
    known: tuple[tuple[str, float], ...] = ()  # figures of others by the same protocol
    changes: tuple[str, ...] = ()  # of the settings, that this set asks for; given ones come after them
    near_duplicates: bool = True  # whether videos that look alike stay in one fold
    make: Callable[[Path], Path] | None = None  # draws the set below a folder on first use, and returns where


_FIGHTS = Protocol("fights300", SHARED / "fights300", known=(("flow + mean image + SVM", 0.71), ("frozen Lite0", 0.73)))
SETS = {
    one.name: one
    for one in (
        _FIGHTS,
        replace(_FIGHTS, name="fights300-random", random=True, known=(("optical flow + SVM", 0.70),)),
        # Two people are left to train on: to keep one of them aside would cost half of all that there is.
        Protocol("steps27", SHARED / "steps27", r"(P\d+)T\d", folds=0, seeds=5, validation=0.0, inner=0.5,
                 known=(("optical flow + SVM", 0.89),)),
        # Nine people, a clip each. Six of them are left to train on: too few to keep some aside.
        Protocol("kth9", SHARED / "kth9", r"person(\d+)", folds=3, validation=0.0, inner=0.5,
                 changes=("clip.sampling=window",)),
        # One speaker before one wall: all videos look alike, and tied together they would be five units.
        Protocol("grid", SHARED / "grid", seeds=1, near_duplicates=False),
        Protocol("motions8", Path(), make=motions.cached,
                 changes=(f"train.flip={json.dumps(motions.MIRRORED)}",)),
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
            made_for = PRESETS[text].clip
            values["clip"] |= {one: getattr(made_for, one) for one in ("frames", "height", "width", "flow")}
    return parse(yaml.safe_dump(values), "the changed settings")


def prepare(protocol: Protocol, settings: Settings, cache: Path) -> Prepared:
    """Decodes the set once, and its clips once a clip spec, by the same functions as the pipeline's stages."""
    if protocol.make:
        protocol = replace(protocol, data=protocol.make(cache))
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
        features = baselines.bank_of(place)
        with bar("Features") as update:
            derive(made, features, bank.tensors, provenance.features(bank.backbone), bank.compute, progress=update)
    return Prepared(protocol, settings, usable.assign(unit=_units(protocol, settings, usable)), place, features)


def _units(protocol: Protocol, settings: Settings, videos: pd.DataFrame) -> Any:
    if protocol.folds:
        return splits.units(videos, settings.validate_.near_duplicate_bits if protocol.near_duplicates else None)
    if videos["group"].isna().any():
        raise InputError(f"{protocol.name}: a video without a group", fix="give --group-pattern, or folds")
    return pd.factorize(videos["group"], sort=True)[0]


@dataclass(frozen=True)
class Fold:
    """One training: `table` has the columns of `sora.dataset.table`; without `test` rows where `inner`.

    `key` names its work in the cache. `configuration` and `division` are digests of what is trained, and of which
    videos on which side.
    """

    number: int
    seed: int
    settings: Settings
    table: pd.DataFrame
    key: str
    configuration: str
    division: str


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
            configuration = crossval.configuration(settings)
            division = rows[["sha256", "label", "split"]].to_csv(index=False)
            what = {"configuration": configuration, "table": division, "commit": commit, "inner": inner}
            key = f"{protocol.name}-{seed}-{number}-{crossval.digest(what)}"
            yield Fold(number, seed, settings, rows, key, crossval.digest(configuration), crossval.digest(division))


@dataclass(frozen=True)
class Classifier:
    """What is asked: the configuration of the prepared settings, or a baseline of `BASELINES`."""

    baseline: str | None = None

    def configuration(self, settings: Settings) -> dict[str, Any]:
        """All that decides its answers, but the videos."""
        values = crossval.configuration(settings)
        if self.baseline is None:
            return values
        about = {"baseline": self.baseline, **BASELINES[self.baseline].settings}
        return {**about, "classes": values["classes"], "clip": values["clip"]}

    def digest(self, fold: Fold) -> str:
        return fold.configuration if self.baseline is None else crossval.digest(self.configuration(fold.settings))

    def answers(self, prepared: Prepared, fold: Fold, cache: Path, judged: Split, on_event: Emit) -> dict[str, Any]:
        """As `crossval.answers`, or `baselines.answers`."""
        if self.baseline is None:
            folder, table = cache / "folds" / fold.key, fold.table
            features = prepared.features
            return crossval.answers(
                folder, prepared.shards, table, fold.settings, judged=judged, features=features, on_event=on_event
            )
        return baselines.answers(BASELINES[self.baseline], prepared.shards, fold.settings.classes, fold.table, judged)


def run(
    prepared: Prepared, plans: list[Fold], asked: Classifier, given: argparse.Namespace, commit: str, out: Path | None
) -> list[FoldRecord]:
    """Asks for the given folds, and writes each to `out` as soon as it is done (None: to no file)."""
    epochs = prepared.settings.train.epochs
    judged: Split = "val" if given.inner else "test"
    results = []
    with bar("Folds") as update:
        for done, fold in enumerate(plans):
            where = f"fold {done + 1} of {len(plans)} (seed {fold.seed})"

            def show(event: dict[str, Any], done: int = done, where: str = where) -> None:
                if event["event"] == "epoch":
                    update(done * epochs + event["epoch"], len(plans) * epochs, where)
                elif event["event"] == "note":
                    say(event["message"])

            answered = asked.answers(prepared, fold, given.cache, judged, show)
            update((done + 1) * epochs, len(plans) * epochs, where)
            record = foldfiles.from_answered(
                answered, set=prepared.protocol.name, seed=fold.seed, fold=fold.number, commit=commit,
                configuration=asked.digest(fold), table=fold.division, classes=fold.settings.classes,
            )  # fmt: skip
            results.append(record)
            if out:
                foldfiles.write(out, record)
    return results


def measure(
    protocol: Protocol, settings: Settings, given: argparse.Namespace, commit: str, most: int | None
) -> tuple[dict[str, Any] | None, int]:
    """One set, from its files to its entry (None: not one fold is done), and how many folds were computed.

    Args:
        most: compute at most so many; None: all that are missing.
    """
    prepared = prepare(protocol, settings, given.cache)
    asked = Classifier(given.baseline)
    if given.baseline and prepared.settings.task.multilabel:
        raise InputError("a baseline answers one class a video", fix="leave out --baseline, or model.head")
    plans = list(plan(prepared, commit, inner=given.inner))
    out, results = None, []
    if not given.inner:
        out = foldfiles.folder_of(given.out / "folds", _set_name(protocol, given), _name(asked, prepared, given))
        wanted = {(fold.seed, fold.number): (asked.digest(fold), fold.division) for fold in plans}
        results = foldfiles.stored(out, wanted, commit if given.fresh else None)
    there = {(record.seed, record.fold) for record in results}
    missing = [fold for fold in plans[: given.limit_folds] if (fold.seed, fold.number) not in there]
    computed = run(prepared, missing[:most], asked, given, commit, out)
    results = sorted([*results, *computed], key=lambda record: (record.seed, record.fold))
    if len(results) < len(plans):
        say(f"{protocol.name}: {len(results)} of {len(plans)} folds are done")
    if not results:
        return None, 0
    entry = {
        "name": " ".join(filter(None, [protocol.name, given.baseline, given.name])),
        "set": protocol.name,
        "protocol": _in_words(protocol, inner=given.inner),
        "leaks": protocol.random,
        "commit": ", ".join(dict.fromkeys(record.commit for record in results)),
        "changes": [*protocol.changes, *given.changes],
        "configuration": asked.configuration(prepared.settings),
        "folds_of": len(plans),
        "incomplete": f"{len(results)} of {len(plans)} folds" if len(results) < len(plans) else None,
        "known": [list(known) for known in protocol.known],
        **summarise(results, prepared.videos),
    }
    return entry, len(computed)


def _set_name(protocol: Protocol, given: argparse.Namespace) -> str:
    """Another division has files of its own, and so leaves those of the protocol alone."""
    marks = ["random"] if given.data and given.random else []
    marks += [f"folds{given.folds}"] if given.folds is not None else []
    return "-".join([foldfiles.plain(protocol.name), *marks])


def _name(asked: Classifier, prepared: Prepared, given: argparse.Namespace) -> str:
    """--name; without one `default`, or a digest of what was changed. A baseline's name comes first."""
    name = foldfiles.plain(given.name)
    if given.name and (name in ("", "default") or name.startswith(tuple(BASELINES))):
        raise InputError(f"--name {given.name!r} is taken, or has no letter", fix="choose another one")
    if not name and (given.changes or given.params):
        name = crossval.digest(asked.configuration(prepared.settings))
    return "-".join(filter(None, [asked.baseline, name])) or "default"


def _in_words(protocol: Protocol, *, inner: bool) -> str:
    kind = "random folds (they leak)" if protocol.random else "grouped folds"
    outer = f"{protocol.folds} {kind}" if protocol.folds else "leave one group out"
    judged = "; judged on inner validation, the outer fold left out" if inner else ""
    return f"{outer}, {protocol.seeds} seeds{judged}"


def main(arguments: list[str] | None = None) -> int:
    given = _options(arguments)
    try:
        commit = common.commit(REPOSITORY)
        protocols = [SETS[name] for name in given.set]
        if given.data:
            name = given.data.resolve().name
            protocols = [Protocol(name, given.data.resolve(), given.group_pattern, random=given.random)]
        entries: list[dict[str, Any]] = []
        left = given.next
        for protocol in protocols:
            changed = {"folds": given.folds, "seeds": given.seeds}
            protocol = replace(protocol, **{key: value for key, value in changed.items() if value is not None})
            settings = settings_of(given.params, [*protocol.changes, *given.changes])
            entry, computed = measure(protocol, settings, given, commit, left)
            if entry:
                entries = store(entry, given.out, "ablation" if given.inner else "accuracy")
            left = None if left is None else left - computed
            if given.next and not left:
                break
    except SoraError as error:
        say(f"bench-accuracy: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        return 130
    if entries:
        shown = ("protocol", "accuracy", "spread", "low", "high", "ece", "folds", "commit")
        table("Accuracy", [{"name": label_of(entry), **{key: entry.get(key) for key in shown}} for entry in entries])
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
    options.add_argument("--next", type=int, metavar="N", help="compute N folds that are missing, and stop")
    options.add_argument("--fresh", action="store_true", help="ignore finished folds of other commits")
    options.add_argument("--baseline", choices=list(BASELINES), help="ask a reference instead of a configuration")
    options.add_argument("--inner", action="store_true", help="judge on inner validation, for choosing settings")
    options.add_argument("--cache", type=Path, default=CACHE, help="clips and finished folds [default: %(default)s]")
    options.add_argument("--out", type=Path, default=common.RESULTS, help="[default: %(default)s]")
    options.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="as in train.epochs=40")
    given = options.parse_args(arguments)
    if given.next is not None and (given.next < 0 or given.inner):
        options.error("--next counts folds from 0, and goes with published ones: use --limit-folds with --inner")
    given.set = given.set or list(SETS)
    return given


if __name__ == "__main__":
    sys.exit(main())
