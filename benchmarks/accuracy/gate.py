"""How often the gate is right, and how far a champion's claimed accuracy drifts above its true one. Simulated.

    python benchmarks/accuracy/gate.py [--nights 100] [--trials 4000] [--json PATH] [--plot PATH]

The model of errors. Every test video has a difficulty d ~ N(0, 1) that all models share; model m is right about a video
when sqrt(rho) d + sqrt(1 - rho) e < Phi^-1(p_m), with e ~ N(0, 1) of its own and p_m its true accuracy. So rho is the
correlation of two models' errors behind the threshold (0.7 unless --rho says otherwise, which at accuracy 0.8 makes two
equals disagree about 17 % of the videos). Classes are balanced.

The decisions are those of `sora.judging.gate` itself (`passes` and `clearly_worse`), called once for every
combination of counts that occurs. Calibration and latency play no part here.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import multivariate_normal, norm

from benchmarks import common
from sora.config import Gate
from sora.core.statistics import wilson
from sora.judging.gate import clearly_worse, passes

SIZES = (45, 60, 150, 300, 1000)
GATE = Gate()  # the defaults of params.yaml
RESULTS = common.RESULTS / "gate.json"
PLOT = common.IMAGES / "gate.png"
RULES = {
    "better": "McNemar at 95 %",
    "not_worse": f"within {GATE.margin:.2f}",
    "bound": f"lower 95 % bound within {GATE.margin:.2f}",
    "ladder": "parameter-free Ladder",
}


@cache
def accepts(rule: str, wins: int, losses: int, videos: int) -> bool:
    """The rule on accuracy: `better` and `not_worse` are the gate's own, the others what it was compared with."""
    if rule in ("better", "not_worse"):
        return passes(rule, wins, losses, videos, GATE)  # type: ignore[arg-type]
    difference = (wins - losses) / videos
    error = (max((wins + losses) / videos - difference**2, 1 / videos) / videos) ** 0.5
    if rule == "bound":  # a non-inferiority test proper
        return bool(difference - 1.645 * error > -GATE.margin)
    if rule == "ladder":  # Blum & Hardt 2015, figure 3: a step above the best by the deviation of the difference
        return bool(difference > error)
    raise ValueError(rule)


@cache
def spoils(wins: int, losses: int, support: int, classes: int) -> bool:
    return clearly_worse(wins, losses, support, classes, GATE)


def disagreement(champion: float, candidate: float, rho: float) -> tuple[float, float]:
    """(candidate alone right, champion alone right): shares of all videos."""
    edges = norm.ppf([champion, candidate])
    both = float(multivariate_normal.cdf(edges, cov=[[1, rho], [rho, 1]], abseps=1e-7, releps=1e-7))
    return candidate - both, champion - both


def decisions(
    rng: np.random.Generator,
    rule: str,
    videos: int,
    champion: float,
    candidate: Sequence[float],
    *,
    rho: float,
    trials: int,
    shared: bool = True,
) -> dict[str, float]:
    """Shares of the trials that were promoted, and that the rule on classes alone refused.

    `candidate` holds its true accuracy on each class; `shared` False tests every class at the full level.
    """
    classes = len(candidate)
    support = np.full(classes, videos // classes)
    support[: videos % classes] += 1
    shares = np.array(
        [(won, lost, 1 - won - lost) for won, lost in (disagreement(champion, p, rho) for p in candidate)]
    )
    counts = rng.multinomial(np.broadcast_to(support, (trials, classes)), shares).tolist()
    promoted = refused_by_class = 0
    for trial in counts:
        accepted = accepts(rule, sum(c[0] for c in trial), sum(c[1] for c in trial), videos)
        level = classes if shared else 1
        spoilt = any(spoils(c[0], c[1], int(n), level) for c, n in zip(trial, support, strict=True))
        promoted += accepted and not spoilt
        refused_by_class += accepted and spoilt
    return {"promoted": promoted / trials, "refused_by_class": refused_by_class / trials}


def drift(
    rng: np.random.Generator,
    rule: str,
    videos: int,
    *,
    nights: int,
    trials: int,
    accuracy: float,
    spread: float,
    rho: float,
    fall: float = 0.0,
) -> dict[str, float]:
    """Retrained models, one a night, against one test split; what the last champion claims and what is true of it.

    A model's true accuracy is N(accuracy - fall * night, spread). The claim is the champion's accuracy on the split.
    """
    difficulty = rng.standard_normal((trials, videos)) * rho**0.5

    def model(night: int) -> tuple[np.ndarray, np.ndarray]:
        true = accuracy - fall * night + spread * rng.standard_normal(trials)
        return true, difficulty + (1 - rho) ** 0.5 * rng.standard_normal((trials, videos)) < norm.ppf(true)[:, None]

    true, right = model(0)
    first = true.mean()
    promotions = 0.0
    for night in range(1, nights + 1):
        candidate, answers = model(night)
        wins, losses = (answers & ~right).sum(axis=1).tolist(), (right & ~answers).sum(axis=1).tolist()
        go = np.array([accepts(rule, w, lost, videos) for w, lost in zip(wins, losses, strict=True)])
        true, right = np.where(go, candidate, true), np.where(go[:, None], answers, right)
        promotions += float(go.mean())
    hits = right.sum(axis=1)
    claim = hits / videos
    plain = np.array([wilson(h, videos)[0] for h in hits])
    looks = np.array([wilson(h, videos, 1 - 0.05 / (nights + 1))[0] for h in hits])
    return {
        "promotions": promotions,
        "claimed_minus_true": float((claim - true).mean()),
        "true_change": float(true.mean() - first),
        "true_below_interval": float((true < plain).mean()),
        "true_below_interval_for_looks": float((true < looks).mean()),
        "interval_for_looks_below_claim": float((claim - looks).mean()),
    }


def run(nights: int, trials: int, rho: float, accuracy: float, spread: float, seed: int) -> dict[str, Any]:
    """All tables, one dictionary a row."""
    rng = np.random.default_rng(seed)
    rates: list[dict[str, Any]] = []
    for rule in ("better", "not_worse", "bound"):
        for videos in SIZES:
            row: dict[str, Any] = {"rule": rule, "videos": videos}
            for name, step in (("equal", 0.0), ("better", 0.05), ("worse", -0.05), ("much_worse", -0.10)):
                found = decisions(rng, rule, videos, accuracy, [accuracy + step] * 2, rho=rho, trials=trials)
                row[name] = found["promoted"]
            rates.append(row)
    by_class: list[dict[str, Any]] = []
    for classes in (2, 6, 27):
        equal = [accuracy] * classes
        # One class loses 30 points and the others make up for it (as far as 0.99 allows), so that the total hides it.
        spoilt = [accuracy - 0.3] + [min(0.99, accuracy + 0.3 / (classes - 1))] * (classes - 1)
        for videos in SIZES:
            row = {"classes": classes, "videos": videos}
            for name, candidate in (("equal", equal), ("spoilt", spoilt)):
                for shared in (True, False):
                    found = decisions(
                        rng, "not_worse", videos, accuracy, candidate, rho=rho, trials=trials, shared=shared
                    )
                    share = found["refused_by_class"] / max(found["promoted"] + found["refused_by_class"], 1e-9)
                    row[f"{name}_{'shared' if shared else 'full'}"] = share
            by_class.append(row)
    drifts: list[dict[str, Any]] = []
    for fall in (0.0, 0.002):
        for rule in ("better", "not_worse", "ladder"):
            for videos in SIZES:
                few = max(20, trials // 10)  # each is a hundred nights
                made = {"accuracy": accuracy, "spread": spread, "rho": rho, "fall": fall}
                found = drift(rng, rule, videos, nights=nights, trials=few, **made)
                drifts.append({"fall": fall, "rule": rule, "videos": videos, **found})
    won, lost = disagreement(accuracy, accuracy, rho)
    settings = {"nights": nights, "trials": trials, "rho": rho, "accuracy": accuracy, "spread": spread, "seed": seed}
    return {
        "settings": {**settings, "equals_disagree": won + lost},
        "rates": rates,
        "by_class": by_class,
        "drift": drifts,
    }


def _table(head: str, rows: Iterable[str]) -> list[str]:
    return ["", head, re.sub(r"[^|]+", "---", head), *rows, ""]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    made = result["settings"]
    lines = [
        f"True accuracy of the champion {made['accuracy']:.2f}; error correlation rho = {made['rho']:.2f}, so that two",
        f"equals disagree about {made['equals_disagree']:.1%} of the videos; {made['trials']} trials",
        f"(drift: a tenth of them); seed {made['seed']}.",
        "",
        "Promoted:",
    ]
    rows = []
    for row in result["rates"]:
        shares = " | ".join(f"{row[name]:.1%}" for name in ("equal", "better", "worse", "much_worse"))
        rows.append(f"| `{row['rule']}`: {RULES[row['rule']]} | {row['videos']} | {shares} |")
    head = "| rule on accuracy | test videos | equal | 5 points better | 5 points worse | 10 points worse |"
    lines += _table(head, rows)

    lines.append("Of those that `not_worse` accepts, refused by the rule on classes")
    lines.append("(its level shared among the classes, as the gate does · each class at the full level):")
    rows = []
    for row in result["by_class"]:
        pairs = [f"{row[f'{name}_shared']:.1%} · {row[f'{name}_full']:.1%}" for name in ("equal", "spoilt")]
        rows.append(f"| {row['classes']} | {row['videos']} | {pairs[0]} | {pairs[1]} |")
    lines += _table("| classes | test videos | equal | one class 30 points worse, the others better |", rows)

    for fall in sorted({row["fall"] for row in result["drift"]}):
        what = "true accuracy stays" if not fall else f"true accuracy falls by {fall * 100:.1f} points a night"
        lines.append(f"{made['nights']} nights against one test split, a retrained model each")
        lines.append(f"(true accuracies spread by {made['spread']:.2f}; {what}):")
        rows = []
        for row in (row for row in result["drift"] if row["fall"] == fall):
            points = [f"{100 * row[name]:+.1f} points" for name in ("claimed_minus_true", "true_change")]
            missed = [f"{row[name]:.1%}" for name in ("true_below_interval", "true_below_interval_for_looks")]
            cells = (f"`{row['rule']}`", str(row["videos"]), f"{row['promotions']:.1f}", *points, *missed)
            rows.append(f"| {' | '.join(cells)} |")
        head = "| rule | test videos | promotions | claimed − true | change of true accuracy "
        lines += _table(head + "| true below the 95 % interval | … below the one for so many looks |", rows)
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    colours = {"equal": "#6b7280", "better": "#0f9d76", "worse": "#d9480f"}
    names = {"equal": "equal", "better": "5 points better", "worse": "5 points worse"}
    for axis, rule in zip(axes[:2], ("better", "not_worse"), strict=True):
        rows = [row for row in result["rates"] if row["rule"] == rule]
        for kind, colour in colours.items():
            axis.plot(SIZES, [row[kind] for row in rows], "o-", color=colour, label=names[kind])
        axis.set(xscale="log", ylim=(-0.03, 1.03), title=f"promoted in mode {rule}", xlabel="test videos")
    for rule, colour in (("better", "#0f9d76"), ("not_worse", "#d9480f"), ("ladder", "#4263eb")):
        rows = [row for row in result["drift"] if row["rule"] == rule and not row["fall"]]
        axes[2].plot(SIZES, [100 * row["claimed_minus_true"] for row in rows], "o-", color=colour, label=rule)
    axes[2].set(
        xscale="log", title=f"claimed − true after {result['settings']['nights']} nights (points)", xlabel="test videos"
    )
    for axis in axes:
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nights", type=int, default=100)
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--rho", type=float, default=0.7)
    parser.add_argument("--accuracy", type=float, default=0.80)
    parser.add_argument("--spread", type=float, default=0.01, help="deviation of retrained models' true accuracy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    given = parser.parse_args()
    started = time.monotonic()
    result = run(given.nights, given.trials, given.rho, given.accuracy, given.spread, given.seed)
    print(table(result))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, given.plot)
    print(f"\n{time.monotonic() - started:.0f} s; wrote {given.json} and {given.plot}")


if __name__ == "__main__":
    main()
