"""Experiments: units and their sums from the events, the statistics from SciPy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
    winsorize: float | None = None
    cuped: timedelta | None = None
    sequential: int | None = None


class Unit(NamedTuple):
    variant: str
    exposed_at: datetime
    events: list[Event]


Amounts = list[Fraction]


class Arm(NamedTuple):
    """One variant by one metric: each unit's sum over the one below it (1 but for a ratio), and the
    same before the exposure."""

    conversions: int
    upper: Amounts
    lower: Amounts
    upper_before: Amounts
    lower_before: Amounts


class Moments(NamedTuple):
    """The value of one arm and the variance of a unit around it."""

    units: int
    conversions: int
    value: Fraction | None
    spread: Fraction | None
    is_rate: bool


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
    event: str | None,
    wanted: str | None,
    where: Mapping[str, Any] | None,
    start: datetime,
    end: datetime | None,
) -> list[Decimal]:
    """The amounts of the unit's events that the metric counts."""
    found = [
        Decimal(1) if wanted is None else number(each.properties.get(wanted))
        for each in unit.events
        if each.event_type == event
        and each.at >= start
        and (end is None or each.at < end)
        and contains(each.properties, where or {})
    ]
    return [amount for amount in found if amount is not None]


def arm_of(units: Sequence[Unit], experiment: Experiment, metric: Metric) -> Arm:
    upper = (metric.event, metric.wanted, metric.where)
    lower = (metric.lower_event, metric.lower_wanted, metric.lower_where)
    converted = []
    columns: list[Amounts] = []
    for is_before in (False, True):
        for what in (upper, lower):
            column = []
            for unit in units:
                start, end = unit.exposed_at, experiment.end
                if metric.window:
                    end = start + metric.window
                if is_before:
                    start, end = start - (experiment.cuped or timedelta()), start
                amounts = counted(unit, *what, start, end)
                if metric.kind != "ratio" and what is lower:
                    column.append(Fraction(1))
                elif metric.kind == "proportion":
                    column.append(Fraction(bool(amounts)))
                else:
                    column.append(sum(map(Fraction, amounts), Fraction(0)))
                if what is upper and not is_before and amounts:
                    converted.append(unit)
            columns.append(column)
    return Arm(len(converted), *columns)


def quantile(amounts: Amounts, share: Fraction) -> Fraction:
    """As numpy does it by default, in fractions."""
    ordered = sorted(amounts)
    place = (len(ordered) - 1) * share
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def winsorized(arms: Mapping[str, Arm], share: float) -> tuple[dict[str, Arm], dict[str, float]]:
    """The arms with amounts cut at percentiles over all of them, and where the upper ones were."""
    cut = {name: list(arm[1:]) for name, arm in arms.items()}
    bounds = {"winsor_low": 0.0, "winsor_high": 0.0}
    for place in range(4):
        everybody = [amount for columns in cut.values() for amount in columns[place]]
        if not everybody:
            break
        low = min(Fraction(0), quantile(everybody, 1 - Fraction(str(share))))
        high = max(Fraction(0), quantile(everybody, Fraction(str(share))))
        for columns in cut.values():
            columns[place] = [min(max(amount, low), high) for amount in columns[place]]
        if place == 0:
            bounds = {"winsor_low": float(low), "winsor_high": float(high)}
    return {name: Arm(arms[name].conversions, *columns) for name, columns in cut.items()}, bounds


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
        bounds: dict[str, float] = {}
        if experiment.winsorize and metric.kind != "proportion":
            arms, bounds = winsorized(arms, experiment.winsorize)
        theta = theta_of(arms.values()) if experiment.cuped else None
        moments = {
            variant: moments_of(metric, arm, theta, arms.values()) for variant, arm in arms.items()
        }
        control = moments[experiment.control]
        for variant, arm in moments.items():
            rows[metric.name, variant] = {
                "is_control": variant == experiment.control,
                "units": len(by_variant[variant]),
                "excluded_units": excluded,
                "conversions": arm.conversions,
                "srm_p_value": srm,
                "is_reliable": is_reliable(metric, [arm, control], srm),
                "is_sequential": experiment.sequential is not None,
                **bounds,
                **reduction(metric, arms[variant], arm, theta),
                **estimate(arm, experiment),
                **({} if variant == experiment.control else comparison(control, arm, experiment)),
            }
    adjust(rows, experiment)
    return rows


def is_reliable(metric: Metric, arms: Sequence[Moments], srm: float | None) -> bool:
    return (
        srm is not None
        and srm >= 0.001
        and all(
            arm.units >= 50
            and arm.conversions >= 5
            and (metric.kind != "proportion" or arm.units - arm.conversions >= 5)
            for arm in arms
        )
    )


def beyond(upper: Amounts, lower: Amounts) -> Amounts:
    """The delta method: what each unit has beyond the ratio, in units of the mean below."""
    ratio, below = sum(upper) / sum(lower), mean(lower)
    return [(up - ratio * low) / below for up, low in zip(upper, lower, strict=True)]


def theta_of(arms: Iterable[Arm]) -> Fraction:
    arms = [arm for arm in arms if arm.upper]
    every = [[amount for arm in arms for amount in arm[place]] for place in range(1, 5)]
    if not arms or not all(sum(arm.lower_before) for arm in arms) or not sum(every[1]):
        return Fraction(0)
    after, before = beyond(every[0], every[1]), beyond(every[2], every[3])
    varied = sum(amount**2 for amount in before)
    return sum(a * b for a, b in zip(after, before, strict=True)) / varied if varied else varied


def moments_of(
    metric: Metric, arm: Arm, theta: Fraction | None, arms: Iterable[Arm] = ()
) -> Moments:
    value: Fraction | None = None
    spread: Fraction | None = None
    units = len(arm.upper)
    is_rate = metric.kind == "proportion" and not theta
    if units and sum(arm.lower):
        value = sum(arm.upper) / sum(arm.lower)
        around = beyond(arm.upper, arm.lower)
        if theta:
            before = sum(arm.upper_before) / sum(arm.lower_before)
            everywhere = sum(sum(each.upper_before) for each in arms) / sum(
                sum(each.lower_before) for each in arms
            )
            value -= theta * (before - everywhere)
            shifts = beyond(arm.upper_before, arm.lower_before)
            around = [a - theta * b for a, b in zip(around, shifts, strict=True)]
        if is_rate:
            spread = value * (1 - value)
        elif units > 1:
            spread = variance(around)
    return Moments(units, arm.conversions, value, spread, is_rate)


def reduction(
    metric: Metric, arm: Arm, adjusted: Moments, theta: Fraction | None
) -> dict[str, float]:
    if theta is None:
        return {}
    plain = moments_of(Metric("", "mean" if theta else metric.kind, ""), arm, None).spread
    answer = {"theta": float(theta)}
    if plain:
        answer["variance_reduction"] = float(1 - adjusted.spread / plain)
    return answer


def estimate(arm: Moments, experiment: Experiment) -> dict[str, float | None]:
    """The value of one arm with its interval."""
    if arm.value is None:
        return {}
    value, confidence = float(arm.value), experiment.confidence
    low = high = None
    if experiment.sequential is not None:
        error = math.sqrt(arm.spread / arm.units) if arm.spread else None
        low, high, _ = sequential(arm.units, value, error, experiment)
    elif arm.is_rate:
        low, high = wilson(arm.conversions, arm.units, confidence)
    elif arm.spread:
        error = math.sqrt(arm.spread / arm.units)
        low, high = map(float, stats.t.interval(confidence, arm.units - 1, value, error))
    return {"value": value, "ci_low": low, "ci_high": high}


def sequential(
    n: int, estimate: float, error: float | None, experiment: Experiment
) -> tuple[float | None, ...]:
    """Low, high, p-value (Waudby-Smith et al. 2024, equation 11 and its tuning)."""
    if error is None:
        return None, None, None
    alpha = 1 - experiment.confidence
    rho2 = (2 * math.log(1 / alpha) + math.log(1 - 2 * math.log(alpha))) / experiment.sequential
    sigma = error * math.sqrt(n)
    margin = sigma * math.sqrt(
        2 * (n * rho2 + 1) / (n**2 * rho2) * math.log(math.sqrt(n * rho2 + 1) / alpha)
    )
    # the likelihood ratio of a mean that is normal around 0, against 0
    log_ratio = stats.norm.logpdf(estimate, 0, math.sqrt(error**2 + rho2 * sigma**2))
    log_ratio -= stats.norm.logpdf(estimate, 0, error)
    return estimate - margin, estimate + margin, min(1.0, math.exp(min(0.0, -log_ratio)))


def wilson(successes: int, n: int, confidence: float) -> tuple[float, float]:
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def comparison(control: Moments, arm: Moments, experiment: Experiment) -> dict[str, float | None]:
    if arm.value is None or control.value is None:
        return {}
    confidence, units = experiment.confidence, arm.units + control.units
    difference = float(arm.value - control.value)
    answer: dict[str, float | None] = {"difference": difference}
    lift = float(arm.value / control.value - 1) if control.value else None
    answer["lift"] = lift
    if arm.is_rate and experiment.sequential is None:
        answer |= pooled_z_test(control, arm, confidence)
    if arm.spread is None or control.spread is None or not arm.spread + control.spread:
        return answer
    squares = arm.spread / arm.units, control.spread / control.units
    error = math.sqrt(sum(squares))
    answer |= posterior(difference, error, confidence)
    lift_error = 0.0
    if control.value:
        lift_error = math.sqrt(
            squares[0] / control.value**2 + arm.value**2 * squares[1] / control.value**4
        )
    if experiment.sequential is not None:
        low, high, p_value = sequential(units, difference, error, experiment)
        answer |= {"difference_low": low, "difference_high": high, "p_value": p_value}
        if lift_error:
            low, high, _ = sequential(units, lift, lift_error, experiment)
            answer |= {"lift_low": low, "lift_high": high}
        return answer
    if not arm.is_rate:
        answer |= welch(
            difference, float(squares[0]), arm.units, float(squares[1]), control.units, confidence
        )
    if lift_error:
        low, high = stats.norm.interval(confidence, lift, lift_error)
        answer |= {"lift_low": float(low), "lift_high": float(high)}
    return answer


def posterior(difference: float, error: float, confidence: float) -> dict[str, float]:
    belief = stats.norm(difference, error)
    low, high = belief.interval(confidence)
    loss = error * stats.norm.pdf(difference / error) - difference * belief.cdf(0)
    return {
        "chance_to_win": float(belief.sf(0)),
        "credible_low": float(low),
        "credible_high": float(high),
        "expected_loss": float(loss),
    }


def pooled_z_test(control: Moments, arm: Moments, confidence: float) -> dict[str, float | None]:
    n1, n2 = control.units, arm.units
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
