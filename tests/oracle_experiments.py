"""Experiments: units and their sums from the events, the statistics from SciPy and NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
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
    """One variant by one metric: each unit's sum, and below it for a ratio."""

    conversions: int
    upper: np.ndarray
    lower: np.ndarray


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
        np.array([float(sum(amounts)) for amounts in upper]),
        np.array([float(sum(amounts)) for amounts in lower]),
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


def estimate(metric: Metric, arm: Arm, confidence: float) -> dict[str, float | None]:
    """Value of one arm with its interval."""
    n = len(arm.upper)
    nothing = {"value": None, "ci_low": None, "ci_high": None}
    if n == 0:
        return nothing
    if metric.kind == "proportion":
        low, high = wilson(arm.conversions, n, confidence)
        return {"value": arm.conversions / n, "ci_low": low, "ci_high": high}
    value, variance = value_and_variance(metric, arm)
    if value is None or variance is None:
        return nothing | {"value": value}
    quantile = (
        stats.t.ppf((1 + confidence) / 2, n - 1)
        if metric.kind == "mean"
        else stats.norm.ppf((1 + confidence) / 2)
    )
    margin = quantile * math.sqrt(variance)
    return {"value": value, "ci_low": value - margin, "ci_high": value + margin}


def wilson(successes: int, n: int, confidence: float) -> tuple[float, float]:
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def value_and_variance(metric: Metric, arm: Arm) -> tuple[float | None, float | None]:
    """The value of one arm and the variance of that estimate."""
    n = len(arm.upper)
    if n == 0:
        return None, None
    if metric.kind == "proportion":
        rate = arm.conversions / n
        return rate, rate * (1 - rate) / n
    if metric.kind == "mean":
        mean = float(np.mean(arm.upper))
        return mean, float(np.var(arm.upper, ddof=1)) / n if n > 1 else None
    below = float(np.mean(arm.lower))
    if below == 0:
        return None, None
    ratio = float(np.mean(arm.upper)) / below
    if n < 2:
        return ratio, None
    # The delta method: the variance of each unit's residual, over the mean below.
    residuals = arm.upper - ratio * arm.lower
    return ratio, float(np.var(residuals, ddof=1)) / n / below**2


def comparison(
    metric: Metric, control: Arm, arm: Arm, confidence: float
) -> dict[str, float | None]:
    value, variance = value_and_variance(metric, arm)
    base, base_variance = value_and_variance(metric, control)
    answer: dict[str, float | None] = dict.fromkeys(
        ("difference", "difference_low", "difference_high", "p_value",
         "lift", "lift_low", "lift_high")
    )  # fmt: skip
    if value is None or base is None:
        return answer
    answer["difference"] = value - base
    answer["lift"] = value / base - 1 if base else None
    if variance is None or base_variance is None:
        return answer
    if metric.kind == "proportion":
        test = pooled_z_test(control, arm, confidence)
    elif metric.kind == "mean":
        test = welch(control, arm, confidence)
    else:
        test = normal_test(value - base, variance + base_variance, confidence)
    answer |= test
    if base:
        answer |= lift_interval(value, variance, base, base_variance, confidence)
    return answer


def pooled_z_test(control: Arm, arm: Arm, confidence: float) -> dict[str, float | None]:
    n1, n2 = len(control.upper), len(arm.upper)
    p1, p2 = control.conversions / n1, arm.conversions / n2
    pooled = (control.conversions + arm.conversions) / (n1 + n2)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n1 + 1 / n2))
    low1, high1 = wilson(control.conversions, n1, confidence)
    low2, high2 = wilson(arm.conversions, n2, confidence)
    return {
        "p_value": 2 * float(stats.norm.sf(abs(p2 - p1) / error)) if error else None,
        "difference_low": p2 - p1 - math.hypot(p2 - low2, high1 - p1),
        "difference_high": p2 - p1 + math.hypot(high2 - p2, p1 - low1),
    }


def welch(control: Arm, arm: Arm, confidence: float) -> dict[str, float | None]:
    if np.var(control.upper) == 0 and np.var(arm.upper) == 0:
        return {}
    test = stats.ttest_ind(arm.upper, control.upper, equal_var=False)
    interval = test.confidence_interval(confidence)
    return {
        "p_value": float(test.pvalue),
        "difference_low": float(interval.low),
        "difference_high": float(interval.high),
    }


def normal_test(difference: float, variance: float, confidence: float) -> dict[str, float | None]:
    if variance == 0:
        return {}
    error = math.sqrt(variance)
    margin = float(stats.norm.ppf((1 + confidence) / 2)) * error
    return {
        "p_value": 2 * float(stats.norm.sf(abs(difference) / error)),
        "difference_low": difference - margin,
        "difference_high": difference + margin,
    }


def lift_interval(
    value: float, variance: float, base: float, base_variance: float, confidence: float
) -> dict[str, float | None]:
    lift = value / base - 1
    error = math.sqrt(variance / base**2 + value**2 * base_variance / base**4)
    margin = float(stats.norm.ppf((1 + confidence) / 2)) * error
    return {"lift": lift, "lift_low": lift - margin, "lift_high": lift + margin}


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
