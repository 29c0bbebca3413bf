"""What `sora tune` may change, and within which bounds: the one place that says so.

A source looks at the settings and names the parameters that have an effect under them. A head that learns from stored
features, say, brings a source of its own: a function in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sora.config import Settings
from sora.core.errors import InputError
from sora.core.trials import Setting


@dataclass(frozen=True, slots=True)
class Real:
    """A number from `low` to `high`; `log`: drawn evenly by its logarithm."""

    name: str  # `section.name` in params.yaml
    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer from `low` to `high`, both included."""

    name: str
    low: int
    high: int
    log: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several values, in no order."""

    name: str
    options: tuple[Setting, ...]


Parameter = Real | Whole | Choice


def of_training(settings: Settings) -> tuple[Parameter, ...]:
    """Optimiser and augmentation: fields of the section `train`."""
    found: list[Parameter] = [
        Real("train.learning_rate", 2e-4, 2e-2, log=True),
        Real("train.weight_decay", 1e-6, 1e-1, log=True),
        Real("train.label_smoothing", 0.0, 0.2),
        Whole("train.epochs", 10, 60, log=True),
        Real("train.mix_up", 0.0, 0.4),
        Real("train.crop", 0.0, 0.4),
        Real("train.speed", 0.0, 0.5),
        Choice("train.ema", (0.0, 0.5, 0.8)),
        Choice("train.jitter", (True, False)),
    ]
    # A list of exceptions is knowledge about the classes, and the view `mirrored` needs mirrored training.
    if isinstance(settings.train.flip, bool) and "mirrored" not in settings.eval.views:
        found.append(Choice("train.flip", (True, False)))
    return tuple(found)


def of_network(settings: Settings) -> tuple[Parameter, ...]:
    """Fields of the section `model`. Which networks there are, and how they are fused, is the user's choice."""
    model = settings.model
    found: list[Parameter] = [Real("model.dropout", 0.0, 0.6), Choice("model.embedding", (64, 128, 256))]
    if model.streams != "high" or model.backbone == "residual":
        found.append(Whole("model.blocks", 1, 3))
    if model.streams != "high":
        found.append(Choice("model.low_filters", _widths(model.low_filters)))
    if model.streams != "low" and model.backbone == "residual":
        found.append(Choice("model.high_filters", _widths(model.high_filters)))
    return tuple(found)


SOURCES: tuple[Callable[[Settings], tuple[Parameter, ...]], ...] = (of_training, of_network)


def parameters(
    settings: Settings,
    only: Sequence[str] = (),
    sources: Sequence[Callable[[Settings], tuple[Parameter, ...]]] = SOURCES,
) -> tuple[Parameter, ...]:
    """What a search may change; `only` restricts it to these names. The project's own value is always within bounds.

    Raises:
        InputError: `only` names what can't be searched.
    """
    known = {one.name: one for source in sources for one in source(settings)}
    wrong = [name for name in only if name not in known]
    if wrong:
        raise InputError(f"{wrong[0]!r} can't be tuned here", fix=f"choose from {', '.join(known)}")
    return tuple(_with_own(one, own(settings, name)) for name, one in known.items() if not only or name in only)


def own(settings: Settings, name: str) -> Setting:
    """The project's value of `section.name`."""
    section, _, key = name.partition(".")
    value: Any = getattr(getattr(settings, section), key)
    return tuple(value) if isinstance(value, list) else value


def nearest(parameter: Parameter, value: Setting) -> Setting:
    """The value, or the nearest one in bounds: a weight decay of 0 has no logarithm."""
    if isinstance(parameter, Choice):
        return next(option for option in parameter.options if option == value)  # 0.0 for 0
    assert isinstance(value, int | float)
    return min(max(value, parameter.low), parameter.high)


def rounded(value: float) -> float:
    """Three significant digits: params.yaml holds what was tried, and people read it."""
    return float(f"{value:.3g}")


def _with_own(parameter: Parameter, value: Setting) -> Parameter:
    if isinstance(parameter, Choice):
        return parameter if value in parameter.options else replace(parameter, options=(*parameter.options, value))
    assert isinstance(value, int | float)
    if parameter.log and value <= 0:
        return parameter
    if isinstance(parameter, Whole):
        return replace(parameter, low=min(parameter.low, int(value)), high=max(parameter.high, int(value)))
    return replace(parameter, low=min(parameter.low, float(value)), high=max(parameter.high, float(value)))


def _widths(filters: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The filters, half and twice as many, within what the settings allow (16 to 2048, multiples of 8)."""
    scaled = (tuple(min(max(round(n * factor / 8) * 8, 16), 2048) for n in filters) for factor in (1.0, 0.5, 2.0))
    return tuple(dict.fromkeys(scaled))
