"""Sora against other networks from scratch: `python -m benchmarks.peers --set steps27|fights300 [KEY=VALUE…]`.

The folds, clips and videos kept aside are those of `benchmarks.accuracy`. In every fold Sora is trained as configured;
then each peer (`benchmarks.peers.training.PEERS`) on the same clips for as many seconds as Sora's training took, in a
process of its own on the same machine, however few of its steps fit; `--network NAME*FACTOR` gives one more time. The
article's network sees single frames, made smaller (`--side`), each with its clip's label; its answer for a clip is the
mean of its frames' probabilities. No peer's settings were tuned to the footage; Sora's are the ones that are given.

What is done is kept by fold and network under the digest of its configuration and the git commit: a killed run goes on.
Leave the machine alone meanwhile: the budget is wall clock. Results: benchmarks/results/peers_SET.json, and
docs/images/accuracy_flops.png of all sets that have some.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import common
from benchmarks.accuracy import crossvalidation, figures, foldfiles
from benchmarks.accuracy.crossvalidation import SETS, Fold, Prepared, Protocol
from benchmarks.accuracy.foldfiles import FoldRecord
from benchmarks.common import REPOSITORY
from benchmarks.peers import training as peer_training
from benchmarks.peers.training import PEERS, PeerJob
from sora.config import Settings
from sora.core.errors import InputError, SoraError
from sora.core.files import atomic, source_digest
from sora.core.progress import bar, say
from sora.learning import crossval
from sora.store.shards import ShardSet

CACHE = REPOSITORY / ".sora" / "peers"
PLOT = REPOSITORY / "docs" / "images" / "accuracy_flops.png"
_CODE = ("training.py", "networks.py", "article.py")
_SHOWN = ("network", "parameters", "GFLOP a clip", "seconds a fold", "passes", "accuracy", "spread", "low", "high")


def sora_fold(prepared: Prepared, fold: Fold, cache: Path, show: Any) -> dict[str, Any]:
    """Sora's own entry of a fold: that of `crossval.answers`, with `passes` over the training clips."""
    answered = crossval.answers(
        cache / "folds" / fold.key / "sora", prepared.shards, fold.table, fold.settings, judged="test", on_event=show
    )
    train = fold.settings.train
    clips = _training_clips(prepared, fold)
    shown = max(-(-clips // train.batch), train.min_steps) * train.batch
    training = {**answered["training"], "passes": answered["training"]["epochs"] * shown / clips}
    return {**answered, "training": training}


def _training_clips(prepared: Prepared, fold: Fold) -> int:
    train = fold.table.loc[fold.table["split"] == "train", "sha256"]
    return int(ShardSet.open(prepared.shards).index["sha256"].isin(train).sum())


def peer_fold(
    prepared: Prepared, fold: Fold, network: str, seconds: float, side: int, cache: Path, show: Any
) -> dict[str, Any]:
    """One peer's entry of a fold, of the same form; trained unless it has been."""
    settings = fold.settings
    what = {"network": network, "seconds": seconds, "code": source_digest(Path(__file__).parent, _CODE)}
    if network == "article":
        what["side"] = side
    folder = cache / "folds" / fold.key / f"{network}-{crossval.digest(what)}"
    result_file = folder / crossval.FOLD_FILE
    if result_file.exists():
        done: dict[str, Any] = json.loads(result_file.read_text("utf-8"))
        return done
    folder.mkdir(parents=True, exist_ok=True)
    fold.table.to_parquet(folder / "table.parquet", index=False)
    job = PeerJob(
        network=network,
        seconds=seconds,
        side=side,
        shards=str(prepared.shards),
        table=str(folder / "table.parquet"),
        classes=list(settings.classes),
        train=settings.to_dict()["train"],
        clip=settings.clip.spec().to_dict(),
        views=list(settings.eval.views),
        out=str(folder / "work"),
    )
    answered = peer_training.run(job, show, log=folder / "training.log")
    answered.pop("event")
    with atomic(result_file) as file:
        file.write(json.dumps(answered, allow_nan=False).encode())
    shutil.rmtree(folder / "work", ignore_errors=True)
    return answered


def ahead(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], videos: pd.DataFrame) -> dict[str, float]:
    """How far our accuracy is above theirs: {"ahead", "ahead_low", "ahead_high"}.

    The 95 % interval is of the paired difference, over the same units as `figures.summarise`'s.
    """

    def right(folds: list[dict[str, Any]]) -> pd.Series:
        rows = pd.DataFrame(
            {"sha256": one["sha256"], "right": float(one["predicted"] == one["label"])}
            for fold in folds
            for one in fold["videos"]
        )
        return rows.groupby("sha256")["right"].mean()

    difference = (right(ours) - right(theirs)).rename("difference").reset_index().merge(videos[["sha256", "unit"]])
    enough = difference["unit"].nunique() >= figures.MIN_UNITS
    cluster = pd.factorize(difference["unit"] if enough else difference["sha256"])[0]
    values = difference["difference"].to_numpy()
    # Of differences that are all the same redrawing finds no others, and Wilson's interval is of shares.
    low, high = figures.bootstrap(values, cluster) if np.ptp(values) else (values[0], values[0])
    return {"ahead": float(values.mean()), "ahead_low": float(low), "ahead_high": float(high)}


def row(name: str, about: str, folds: list[dict[str, Any]], videos: pd.DataFrame, flops: int) -> dict[str, Any]:
    """A network's line of the table; medians and means are over folds."""
    trained = [fold["training"] for fold in folds]
    return {
        "network": name,
        "about": about,
        **figures.summarise([_record(fold) for fold in folds], videos),
        "GFLOP a clip": flops / 1e9,
        "seconds a fold": float(np.mean([one["seconds"] for one in trained])),
        "passes": float(np.median([one["passes"] for one in trained])),
        "steps": [one.get("steps") for one in trained],
        "latency_ms": float(np.median([fold["metrics"]["latency_ms"] for fold in folds])),
    }


def _record(entry: dict[str, Any]) -> FoldRecord:
    """A fold's entry as `figures.summarise` takes it; no file is written of it."""
    nothing = {"set": "", "configuration": "", "table": "", "commit": "", "classes": ()}
    return foldfiles.from_answered(entry, seed=entry["seed"], fold=entry["fold"], **nothing)


def measure(protocol: Protocol, settings: Settings, given: argparse.Namespace, commit: str) -> dict[str, Any]:
    """One set, from its files to its entry."""
    prepared = crossvalidation.prepare(protocol, settings, given.clips)
    plans = list(crossvalidation.plan(prepared, commit, inner=False))
    chosen = [fold for fold in plans if given.folds is None or fold.number in given.folds]
    if not chosen:
        raise InputError(f"--folds {given.folds} are none of {protocol.name}'s", fix="count from 0")
    results: dict[str, list[dict[str, Any]]] = {"sora": [], **{name: [] for name in given.network}}
    total = len(chosen) * len(results)
    with bar("Trainings") as update:
        for done, fold in enumerate(chosen):
            for number, name in enumerate(results):
                where = f"seed {fold.seed} fold {fold.number} {name}"

                def show(event: dict[str, Any], at: int = done * len(results) + number, where: str = where) -> None:
                    if event["event"] == "note":
                        say(event["message"])
                    elif event["event"] == "step":
                        update(at, total, f"{where}: {event['steps']} steps, {event['seconds']:.0f} s")
                    else:
                        update(at, total, where)

                if name == "sora":
                    answered = sora_fold(prepared, fold, given.cache, show)
                else:
                    network, _, factor = name.partition("*")
                    seconds = given.budget or results["sora"][-1]["training"]["seconds"]
                    seconds = round(seconds * float(factor or 1), 1)
                    answered = peer_fold(prepared, fold, network, seconds, given.side, given.cache, show)
                results[name].append({**answered, "seed": fold.seed, "fold": fold.number})
    spec = settings.clip.spec()
    flops = {"sora": peer_training.cost(settings.model, spec, len(prepared.settings.classes))["flops"]}
    flops |= {name: results[name][0]["training"]["flops"] for name in given.network}
    about = {name: PEERS[name.partition("*")[0]].about for name in given.network}
    about = {name: text + (f", {given.side} pixels" if "article" in name else "") for name, text in about.items()}
    about["sora"] = f"Sora, preset {settings.model.preset}"
    return {
        "name": protocol.name,
        "partial": len(chosen) < len(plans),
        "folds": [[fold.seed, fold.number] for fold in chosen],
        "folds_of": len(plans),
        "budget": given.budget or "what Sora's training of the fold took",
        "commit": commit,
        "changes": [*protocol.changes, *given.changes],
        "configuration": crossval.configuration(prepared.settings),
        "majority": float(prepared.videos["label"].value_counts(normalize=True).max()),
        "networks": [
            {
                **row(name, about[name], folds, prepared.videos, flops[name]),
                **({} if name == "sora" else ahead(results["sora"], folds, prepared.videos)),
            }
            for name, folds in results.items()
        ],
    }


def plot(entries: list[dict[str, Any]], file: Path) -> None:
    """PNG: accuracy with its interval against the FLOPs of a clip; a panel a set, a point a network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(entries), 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axis, entry in zip(np.atleast_1d(figure.subplots(1, len(entries))), entries, strict=True):
        for number, one in enumerate(entry["networks"]):
            ours = one["network"] == "sora"
            y = one["accuracy"]
            axis.errorbar(
                one["GFLOP a clip"], y, [[max(0, y - one["low"])], [max(0, one["high"] - y)]],
                fmt="*" if ours else "osD^vP"[number % 6], markersize=12 if ours else 6, color=f"C{number}",
                capsize=3, elinewidth=1, label=one["network"],
            )  # fmt: skip
        axis.axhline(entry["majority"], color="#d9730d", linewidth=1, linestyle="--")
        title = f"{entry['name']}: {len(entry['folds'])} of {entry['folds_of']} trainings a network"
        axis.set(xscale="log", ylim=(0, 1.03), xlabel="GFLOP a clip (2 a multiply-add)", title=title)
        axis.set_ylabel("accuracy, 95% interval; dashed: the largest class")
        axis.margins(x=0.15)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def stored(out: Path) -> list[dict[str, Any]]:
    """The entries of all sets that were measured."""
    return [json.loads(file.read_text("utf-8"))["result"] for file in sorted(out.glob("peers_*.json"))]


def main(arguments: list[str] | None = None) -> int:
    given = _options(arguments)
    try:
        protocol = SETS[given.set]
        if given.data:
            protocol = Protocol(given.data.resolve().name, given.data.resolve(), given.group_pattern)
        protocol = replace(protocol, seeds=given.seeds or protocol.seeds)
        settings = crossvalidation.settings_of(given.params, [*protocol.changes, *given.changes])
        entry = measure(protocol, settings, given, common.commit(REPOSITORY))
    except SoraError as error:
        say(f"bench-peers: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        return 130
    common.write(f"peers_{entry['name']}", entry, given.out)
    plot(stored(given.out), given.plot)
    rows = [{key: one[key] for key in _SHOWN} for one in entry["networks"]]
    for line, one in zip(rows, entry["networks"], strict=True):
        shown = f"{one['ahead']:+.3f} ({one['ahead_low']:+.3f} to {one['ahead_high']:+.3f})" if "ahead" in one else ""
        line["Sora ahead by"] = shown
    done = f"{len(entry['folds'])} of {entry['folds_of']} trainings each" + (", PARTIAL" if entry["partial"] else "")
    table_title = f"{entry['name']}, {done}; budget: {entry['budget']}"
    common.table(table_title, rows)
    return 0


def _network(text: str) -> str:
    name, star, factor = text.partition("*")
    if name not in PEERS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PEERS)}")
    if star and not float(factor) > 0:
        raise argparse.ArgumentTypeError(f"{factor!r} is no factor of the time")
    return text


def _options(arguments: list[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--set", choices=list(SETS), default="steps27", help="[default: %(default)s]")
    options.add_argument("--data", type=Path, help="a folder of labelled videos instead of a set")
    options.add_argument("--group-pattern", help="with --data: see split.group_pattern")
    options.add_argument("--params", type=Path, help="a params.yaml to start from [default: the defaults]")
    options.add_argument("--seeds", type=int, help="[default: the set's]")
    options.add_argument("--folds", type=lambda text: [int(one) for one in text.split(",")], help="only these, as 0,2")
    options.add_argument("--network", type=_network, action="append", metavar="NAME[*FACTOR]",
                         help=f"a peer, of {', '.join(PEERS)}; with a factor of the time [default: all]")  # fmt: skip
    options.add_argument("--budget", type=lambda text: None if text == "auto" else float(text), metavar="SECONDS|auto",
                         help="of a peer's training [default: auto, what Sora's took]")  # fmt: skip
    options.add_argument("--side", type=int, default=56, help="of the article network's frames [default: %(default)s]")
    options.add_argument(
        "--clips", type=Path, default=crossvalidation.CACHE, help="decoded sets [default: %(default)s]"
    )
    options.add_argument("--cache", type=Path, default=CACHE, help="finished trainings [default: %(default)s]")
    options.add_argument("--out", type=Path, default=common.RESULTS, help="[default: %(default)s]")
    options.add_argument("--plot", type=Path, default=PLOT, help="[default: %(default)s]")
    options.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="as in train.epochs=40")
    given = options.parse_args(arguments)
    given.network = list(dict.fromkeys(given.network or PEERS))
    return given


if __name__ == "__main__":
    sys.exit(main())
