"""A few rounds of `make test-faults`: crashes on purpose, and the proof that nothing is lost. And
that the proof would notice."""

from __future__ import annotations

import os
from random import Random

import psycopg
import pytest
from faults.controls import CONTROLS, notices
from faults.faults import FAULTS, MAIN_KINDS, plan
from faults.rounds import Outcome, play_all, table
from faults.server import Server


def test_rounds(private_server: Server) -> None:
    seed = os.environ.get("FAULTS_SEED", "make-test")
    outcomes: list[Outcome] = []
    play_all(private_server, seed, MAIN_KINDS, 4, outcomes.append)
    assert [outcome.finding.wrong for outcome in outcomes if not outcome.is_well] == []
    # Each fault met somebody at work, and there was something to lose.
    assert all(outcome.interrupted and outcome.more("facts") > 50 for outcome in outcomes)
    assert table(outcomes).count("\n") == len(MAIN_KINDS) + 2


def test_the_proof_notices_rows_marked_before_they_are_loaded(private_server: Server) -> None:
    noticed, detail = notices(private_server, list(CONTROLS)[1], "make-test")
    assert noticed, detail


@pytest.mark.parametrize("name", CONTROLS)
def test_what_a_control_takes_out_is_there(db: psycopg.Connection, name: str) -> None:
    CONTROLS[name].apply(db)


@pytest.mark.parametrize("rounds", [1, 4, 20, 100])
def test_a_plan_holds_all_kinds_there_is_room_for(rounds: int) -> None:
    planned = plan(rounds, Random(1))
    assert len(planned) == rounds and len(set(planned)) >= min(rounds, len(MAIN_KINDS))
    assert rounds < 20 or set(planned) == set(FAULTS)
