"""`make test-faults`: the rounds, the controls, the table; exit code 1 if anything is off."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from random import Random

from .controls import CONTROLS, notices
from .faults import FAULTS, plan
from .rounds import Outcome, make_template, play_all, table
from .server import Server


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", help="as printed by an earlier run")
    parser.add_argument("--fault", choices=list(FAULTS), help="this kind alone")
    parser.add_argument("--rounds-a-database", type=int, default=4)
    parser.add_argument("--no-controls", action="store_true", help="the rounds alone")
    parser.add_argument("--only-controls", action="store_true", help="no rounds")
    options = parser.parse_args()
    # Whoever ends this by a signal has the server ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    seed = options.seed or f"{time.time_ns() % 10**9}"
    print(f"seed {seed}: the same with --seed {seed}", flush=True)
    faults = plan(0 if options.only_controls else options.rounds, Random(seed))
    if options.fault:
        faults = [options.fault] * len(faults)
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(
            f"{len(outcomes):>4} of {len(faults)}  {outcome.fault:<26}"
            f" {outcome.more('events'):>5} events, {outcome.interrupted:>3} broke off,"
            f" {outcome.seconds:4.1f} s  "
            f"{'well' if outcome.is_well else f'NOT WELL, seed {outcome.seed}'}",
            flush=True,
        )
        for wrong in outcome.finding.wrong[:10]:
            print(f"       {wrong[:400]}", flush=True)

    unnoticed = []
    try:
        with Server() as server:
            make_template(server)
            play_all(server, seed, faults, options.rounds_a_database, tell)
            for name in [] if options.no_controls else CONTROLS:
                noticed, detail = notices(server, name, seed)
                unnoticed += [] if noticed else [name]
                print(f"control: {name}: {detail}", flush=True)
    finally:
        # Also of a run that was ended before its end.
        if outcomes:
            print(f"\n{table(outcomes)}")
    unwell = [outcome.seed for outcome in outcomes if not outcome.is_well]
    print(
        f"\n{len(outcomes)} rounds, {len(unwell)} not well{f': {unwell}' if unwell else ''}\n"
        f"{0 if options.no_controls else len(CONTROLS)} controls, {len(unnoticed)} not noticed"
    )
    return 1 if unwell or unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
