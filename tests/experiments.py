"""An experiment: how it is defined, and the events of its users."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import psycopg
from histories import Payload
from oracle_experiments import Experiment
from psycopg.types.json import Jsonb

START = datetime(2024, 5, 1, tzinfo=UTC)
EVEN = {"control": 0.5, "treatment": 0.5}


def define(db: psycopg.Connection, experiment: Experiment) -> None:
    for metric in experiment.metrics:
        db.execute(
            "SELECT spectrum.define_metric(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                metric.name, metric.kind, metric.event, metric.wanted, metric.window,
                metric.where and Jsonb(metric.where), metric.lower_event, metric.lower_wanted,
                metric.lower_where and Jsonb(metric.lower_where), metric.is_guardrail,
            ),
        )  # fmt: skip
    db.execute(
        "SELECT spectrum.define_experiment(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            experiment.name, Jsonb(experiment.variants), experiment.control,
            Jsonb([metric.name for metric in experiment.metrics]), experiment.start,
            experiment.end, experiment.confidence, experiment.correction, experiment.winsorize,
            experiment.cuped, experiment.sequential,
        ),
    )  # fmt: skip


def happening(kind: str, user: str, after: timedelta, **properties: object) -> Payload:
    return {"event_type": kind, "user_id": user, "occurred_at": (START + after).isoformat(),
            "account_id": "a1", "properties": properties}  # fmt: skip


def seen(user: str, variant: object, after: timedelta = timedelta()) -> Payload:
    return happening("experiment_exposure", user, after, experiment="e", variant=variant)
