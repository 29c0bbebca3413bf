"""Great Expectations behind typed functions: an expectation is built here, and a table is judged here.

A function such as `between` names the column and what is allowed, and returns an `Expectation`. Great Expectations
itself is imported when a table is judged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from sora.core.processes import QUIET_ENV

Severity = Literal["quarantine", "stop", "warn"]
_THEIR_SEVERITY: dict[Severity, str] = {"stop": "critical", "quarantine": "warning", "warn": "info"}


@dataclass(frozen=True)
class Expectation:
    """What a table must satisfy. `build` gets Great Expectations' module and the labels that every expectation has.

    `column` is None if the expectation is about the table as a whole.
    """

    column: str | None
    build: Callable[[Any, dict[str, Any]], Any]


@dataclass(frozen=True)
class Question:
    """An expectation with what Great Expectations prints about it; `name` is unique in a table."""

    name: str
    severity: Severity
    says: str
    expectation: Expectation


@dataclass(frozen=True)
class Answer:
    """`broken` holds the keys of the rows that break it; `value` is what was observed if it is about the table."""

    success: bool
    broken: tuple[str, ...]
    value: float | None


def none_of(column: str, *values: str) -> Expectation:
    """No row holds one of the values."""
    return Expectation(
        column,
        lambda gxe, labels: gxe.ExpectColumnValuesToNotBeInSet(column=column, value_set=list(values), **labels),
    )


def one_of(column: str, values: Sequence[str]) -> Expectation:
    """Every row with a value holds one of these."""
    return Expectation(
        column, lambda gxe, labels: gxe.ExpectColumnValuesToBeInSet(column=column, value_set=list(values), **labels)
    )


def present(column: str) -> Expectation:
    """Every row holds a value."""
    return Expectation(column, lambda gxe, labels: gxe.ExpectColumnValuesToNotBeNull(column=column, **labels))


def unique(column: str) -> Expectation:
    """No two rows hold the same value."""
    return Expectation(column, lambda gxe, labels: gxe.ExpectColumnValuesToBeUnique(column=column, **labels))


def between(column: str, *, least: float | None = None, most: float | None = None) -> Expectation:
    """Every value is at least `least` and at most `most`. Rows without a value pass."""
    return Expectation(
        column, lambda gxe, labels: gxe.ExpectColumnValuesToBeBetween(column=column, **_range(least, most), **labels)
    )


def total(column: str, *, most: float) -> Expectation:
    """The sum of the column is at most `most`; it is the value observed."""
    return Expectation(
        column, lambda gxe, labels: gxe.ExpectColumnSumToBeBetween(column=column, max_value=most, **labels)
    )


def distinct(column: str, *, least: int) -> Expectation:
    """The column holds at least this many different values; their number is the value observed."""
    return Expectation(
        column,
        lambda gxe, labels: gxe.ExpectColumnUniqueValueCountToBeBetween(column=column, min_value=least, **labels),
    )


def rows(*, least: int) -> Expectation:
    """The table has at least this many rows; their number is the value observed."""
    return Expectation(None, lambda gxe, labels: gxe.ExpectTableRowCountToBeBetween(min_value=least, **labels))


def _range(least: float | None, most: float | None) -> dict[str, float]:
    bounds = {"min_value": least, "max_value": most}
    return {name: value for name, value in bounds.items() if value is not None}


class Judge:
    """Great Expectations with a context that keeps nothing, contacts nobody and shows no progress bars."""

    def __init__(self) -> None:
        os.environ.setdefault("GX_ANALYTICS_ENABLED", QUIET_ENV["GX_ANALYTICS_ENABLED"])
        import great_expectations as gx
        from great_expectations.data_context.types.base import ProgressBarsConfig

        self._context: Any = gx.get_context(mode="ephemeral")
        self._context.variables.progress_bars = ProgressBarsConfig(globally=False)

    def __call__(
        self, suite: str, table: pd.DataFrame, key: str, questions: Sequence[Question]
    ) -> tuple[list[Answer], Any]:
        """An answer to each question, in order, and Great Expectations' own result for the Data Docs.

        Args:
            suite: the name of this set of questions.
            table: holds every column that a question is about.
            key: the column that names a row.

        Raises:
            RuntimeError: Great Expectations could not judge a question. That is a fault in Sora.
        """
        import great_expectations as gx
        import great_expectations.expectations as gxe

        built = [
            question.expectation.build(
                gxe,
                {
                    "severity": _THEIR_SEVERITY[question.severity],
                    "description": question.says,
                    "meta": {"name": question.name},
                },
            )
            for question in questions
        ]
        asset = self._context.data_sources.add_pandas(suite).add_dataframe_asset(suite)
        batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": table})
        result = batch.validate(
            self._context.suites.add(gx.ExpectationSuite(name=suite, expectations=built)),
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [key]},
        )
        answers = {one.expectation_config.meta["name"]: _answer(one, key) for one in result.results}
        return [answers[question.name] for question in questions], result


def _answer(result: Any, key: str) -> Answer:
    for error in [result.exception_info, *result.exception_info.values()]:
        if isinstance(error, dict) and error.get("raised_exception"):
            name = result.expectation_config.meta["name"]
            raise RuntimeError(f"Great Expectations failed on {name}: {error['exception_message']}")
    broken = result.result.get("unexpected_index_list") or []
    value = result.result.get("observed_value")
    return Answer(
        bool(result.success), tuple(sorted(str(row[key]) for row in broken)), None if value is None else float(value)
    )
