"""Experiments: units and their sums from the events, the statistics from SciPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from statistics import mean, variance
from typing import Any, NamedTuple

import numpy as np
from oracle_events import Event, contains, number, of_account
from scipy import stats


@dataclass(frozen=True)
class Metric:
    name: str
    kind: str
    event: str
    wanted: str | None = None
    window: timedelta | None = None
    where: Mapping[str, Any] | None = None
    lower_event: str | None = None
    lower_wanted: str | None = None
    lower_where: Mapping[str, Any] | None = None
    is_guardrail: bool = False


@dataclass(frozen=True)
class Experiment:
    name: str
    variants: Mapping[str, float]
    control: str
    metrics: Sequence[Metric]
    start: datetime | None = None
    end: datetime | None = None
    confidence: float = 0.95
    correction: str = "holm"


class Unit(NamedTuple):
    variant: str
    exposed_at: datetime
    events: list[Event]


class Arm(NamedTuple):
    """One variant by one metric: each unit's sum, and for a ratio the one below it."""

    conversions: int
    upper: list[Fraction]
    lower: list[Fraction]


def exposure(event: Event, experiment: str) -> str | None:
    names = {
        "experiment_exposure": ("experiment", "variant"),
        "$feature_flag_called": ("$feature_flag", "$feature_flag_response"),
    }
    if event.event_type not in names:
        return None
    flag, variant = (event.properties.get(name) for name in names[event.event_type])
    if flag != experiment or variant in (None, ""):
        return None
    return variant if isinstance(variant, str) else str(variant).lower()


def units_of(events: Sequence[Event], experiment: Experiment) -> tuple[list[Unit], int]:
    """The units that count, and how many are left out."""
    by_user: dict[str, list[Event]] = {}
    for event in events:
        if event.user is not None:
            by_user.setdefault(event.user, []).append(event)
    units, excluded = [], 0
    for mine in by_user.values():
        seen = [
            (event.at, variant)
            for event in mine
            if (variant := exposure(event, experiment.name)) is not None
            and (experiment.start is None or event.at >= experiment.start)
            and (experiment.end is None or event.at < experiment.end)
        ]
        if not seen:
            continue
        variants = {variant for _, variant in seen}
        if len(variants) == 1 and variants <= experiment.variants.keys():
            units.append(Unit(seen[0][1], min(at for at, _ in seen), mine))
        else:
            excluded += 1
    return units, excluded


def counted(
    unit: Unit,
    experiment: Experiment,
    metric: Metric,
    event: str | None,
    wanted: str | None,
    where: Mapping[str, Any] | None,
) -> list[Decimal]:
    """The amounts of the unit's events that the metric counts."""
    end = unit.exposed_at + metric.window if metric.window else experiment.end
    found = [
        Decimal(1) if wanted is None else number(each.properties.get(wanted))
        for each in unit.events
        if each.event_type == event
        and each.at >= unit.exposed_at
        and (end is None or each.at < end)
        and contains(each.properties, where or {})
    ]
    return [amount for amount in found if amount is not None]


def arm_of(units: Sequence[Unit], experiment: Experiment, metric: Metric) -> Arm:
    upper = [
        counted(unit, experiment, metric, metric.event, metric.wanted, metric.where)
        for unit in units
    ]
    lower = [
        counted(
            unit, experiment, metric, metric.lower_event, metric.lower_wanted, metric.lower_where
        )
        for unit in units
    ]
    return Arm(
        sum(1 for amounts in upper if amounts),
        [sum(map(Fraction, amounts), Fraction(0)) for amounts in upper],
        [sum(map(Fraction, amounts), Fraction(0)) for amounts in lower],
    )


def sample_ratio(counts: Sequence[int], weights: Sequence[float]) -> float | None:
    if not sum(counts):
        return None
    expected = np.array(weights) / sum(weights) * sum(counts)
    return float(stats.chisquare(counts, expected).pvalue)


def results(
    everywhere: Sequence[Event], experiment: Experiment, account: str | None = None
) -> dict[tuple[str, str], dict[str, Any]]:
    units, excluded = units_of(of_account(everywhere, account), experiment)
    by_variant = {
        variant: [unit for unit in units if unit.variant == variant]
        for variant in experiment.variants
    }
    srm = sample_ratio(
        [len(each) for each in by_variant.values()], list(experiment.variants.values())
    )
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for metric in experiment.metrics:
        arms = {variant: arm_of(each, experiment, metric) for variant, each in by_variant.items()}
        control = arms[experiment.control]
        for variant, arm in arms.items():
            rows[metric.name, variant] = {
                "is_control": variant == experiment.control,
                "units": len(by_variant[variant]),
                "excluded_units": excluded,
                "conversions": arm.conversions,
                "srm_p_value": srm,
                "is_reliable": is_reliable(metric, [arm, control], srm),
                **estimate(metric, arm, experiment.confidence),
                **(
                    {}
                    if variant == experiment.control
                    else comparison(metric, control, arm, experiment.confidence)
                ),
            }
    adjust(rows, experiment)
    return rows


def is_reliable(metric: Metric, arms: Sequence[Arm], srm: float | None) -> bool:
    return (
        srm is not None
        and srm >= 0.001
        and all(
            len(arm.upper) >= 50
            and arm.conversions >= 5
            and (metric.kind != "proportion" or len(arm.upper) - arm.conversions >= 5)
            for arm in arms
        )
    )


def moments(metric: Metric, arm: Arm) -> tuple[Fraction | None, Fraction | None]:
    """The value of one arm, and the variance of a unit around it."""
    if not arm.upper:
        return None, None
    if metric.kind == "proportion":
        rate = Fraction(arm.conversions, len(arm.upper))
        return rate, rate * (1 - rate)
    if metric.kind == "mean":
        around = arm.upper
        value = mean(around)
    else:
        if not sum(arm.lower):
            return None, None
        # The delta method: what a unit has beyond the ratio, in units of the mean below.
        value = sum(arm.upper) / sum(arm.lower)
        below = mean(arm.lower)
        around = [
            (upper - value * lower) / below
            for upper, lower in zip(arm.upper, arm.lower, strict=True)
        ]
    return value, variance(around) if len(around) > 1 else None


def estimate(metric: Metric, arm: Arm, confidence: float) -> dict[str, float | None]:
    """The value of one arm with its interval."""
    n = len(arm.upper)
    value, spread = moments(metric, arm)
    answer = {"value": None if value is None else float(value)}
    if metric.kind == "proportion" and n:
        low, high = wilson(arm.conversions, n, confidence)
        return answer | {"ci_low": low, "ci_high": high}
    if value is None or not spread:
        return answer
    interval = stats.t.interval(confidence, n - 1, float(value), math.sqrt(spread / n))
    return answer | {"ci_low": float(interval[0]), "ci_high": float(interval[1])}


def wilson(successes: int, n: int, confidence: float) -> tuple[float, float]:
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def comparison(
    metric: Metric, control: Arm, arm: Arm, confidence: float
) -> dict[str, float | None]:
    value, spread = moments(metric, arm)
    base, base_spread = moments(metric, control)
    if value is None or base is None:
        return {}
    answer: dict[str, float | None] = {"difference": float(value - base)}
    if base:
        answer["lift"] = float(value / base - 1)
    if metric.kind == "proportion":
        answer |= pooled_z_test(control, arm, confidence)
    if spread is None or base_spread is None or not spread + base_spread:
        return answer
    error, base_error = spread / len(arm.upper), base_spread / len(control.upper)
    if metric.kind != "proportion":
        answer |= welch(
            float(value - base), float(error), len(arm.upper), float(base_error),
            len(control.upper), confidence,
        )  # fmt: skip
    lift_error = error / base**2 + value**2 * base_error / base**4 if base else 0
    if lift_error:
        lift = stats.norm.interval(confidence, float(value / base - 1), math.sqrt(lift_error))
        answer |= {"lift_low": float(lift[0]), "lift_high": float(lift[1])}
    return answer


def pooled_z_test(control: Arm, arm: Arm, confidence: float) -> dict[str, float | None]:
    n1, n2 = len(control.upper), len(arm.upper)
    p1, p2 = control.conversions / n1, arm.conversions / n2
    pooled = Fraction(control.conversions + arm.conversions, n1 + n2)
    error = math.sqrt(pooled * (1 - pooled) * (Fraction(1, n1) + Fraction(1, n2)))
    low1, high1 = wilson(control.conversions, n1, confidence)
    low2, high2 = wilson(arm.conversions, n2, confidence)
    return {
        "p_value": 2 * float(stats.norm.sf(abs(p2 - p1) / error)) if error else None,
        "difference_low": p2 - p1 - math.hypot(p2 - low2, high1 - p1),
        "difference_high": p2 - p1 + math.hypot(high2 - p2, p1 - low1),
    }


def welch(
    difference: float, error1: float, n1: int, error2: float, n2: int, confidence: float
) -> dict[str, float | None]:
    """Welch's t, from the squared errors of both values."""
    error = math.sqrt(error1 + error2)
    df = (error1 + error2) ** 2 / (error1**2 / (n1 - 1) + error2**2 / (n2 - 1))
    interval = stats.t.interval(confidence, df, difference, error)
    return {
        "p_value": 2 * float(stats.t.sf(abs(difference) / error, df)),
        "difference_low": float(interval[0]),
        "difference_high": float(interval[1]),
    }


def adjust(rows: dict[tuple[str, str], dict[str, Any]], experiment: Experiment) -> None:
    """p_adjusted over all metrics and variants; guardrails and untested ones are no part."""
    guardrails = {metric.name for metric in experiment.metrics if metric.is_guardrail}
    family = [
        row
        for (metric, _), row in rows.items()
        if metric not in guardrails and row.get("p_value") is not None
    ]
    family.sort(key=lambda row: row["p_value"])
    size, running = len(family), 0.0
    if experiment.correction == "holm":
        for place, row in enumerate(family):
            running = max(running, min(1.0, row["p_value"] * (size - place)))
            row["p_adjusted"] = running
    else:
        adjusted = stats.false_discovery_control([row["p_value"] for row in family])
        for row, value in zip(family, adjusted, strict=True):
            row["p_adjusted"] = float(value)
