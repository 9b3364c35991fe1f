"""Crashes on purpose: clients, workers and refreshes at work, a fault, recovery, and the proof that
every committed event is there once. `python -m faults --help`, from the folder tests.

    server.py    a private PostgreSQL, to be killed
    events.py    what clients send
    journal.py   what clients know: what they sent, and what was acknowledged
    sessions.py  clients, workers, refreshes, a keeper, all at once
    faults.py    what goes wrong
    checker.py   what must be true afterwards, worked out from the journal
    rounds.py    one round after the other, and their table
    controls.py  Spectrum with one protection taken out each: the checker has to notice
"""
