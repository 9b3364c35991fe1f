"""PII rules: what a rule takes away is nowhere, the key is in no dump, and nobody but the owner
sees what was kept."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import OWNER, Connect, MakeDb, MakeRole, run_sql
from forgetting import traces
from pipeline import drain, event, insert, prove, rows, statuses, value
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from test_dump_restore import tool

KEY = bytes(range(32))
ID, MAIL, CITY = "ann.marker", "mail-4711@example.org", "Zanzibar"
PERSON = event(
    "visit", event_id="e", user_id=ID, account_id="acme", geo={"country": "TZ", "city": CITY},
    properties={"email": MAIL, "plan": "pro", "billing": {"iban": "IBAN-4711"}},
)  # fmt: skip

# RFC 4231, test cases 1 to 4, 6 and 7: key, data, HMAC-SHA-256.
RFC_4231 = [
    ("0b" * 20, b"Hi There".hex(),
     "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
    (b"Jefe".hex(), b"what do ya want for nothing?".hex(),
     "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
    ("aa" * 20, "dd" * 50, "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"),
    ("0102030405060708090a0b0c0d0e0f10111213141516171819", "cd" * 50,
     "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"),
    ("aa" * 131, b"Test Using Larger Than Block-Size Key - Hash Key First".hex(),
     "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"),
    ("aa" * 131, b"This is a test using a larger than block-size key and a larger than block-size"
     b" data. The key needs to be hashed before being used by the HMAC algorithm.".hex(),
     "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"),
]  # fmt: skip


def hashed(text: str) -> str:
    return hmac.new(KEY, text.encode(), hashlib.sha256).hexdigest()


def define(db: psycopg.Connection, keep: bool = False) -> None:
    db.execute("SELECT spectrum.set_pii_key(%s)", (KEY,))
    db.execute("SELECT spectrum.define_pii('user_id', 'hmac', %s)", (keep,))
    db.execute("SELECT spectrum.define_pii('properties.email', 'hmac', %s)", (keep,))
    db.execute("SELECT spectrum.define_pii('properties.billing.iban', 'drop')")
    db.execute("SELECT spectrum.define_pii('geo.city', 'drop')")
    db.execute("SELECT spectrum.define_pii('properties.plan', 'keep')")


def test_hmac(db: psycopg.Connection) -> None:
    for key, data, expected in RFC_4231:
        call = "SELECT encode(spectrum._hmac_sha256(decode(%s, 'hex'), decode(%s, 'hex')), 'hex')"
        assert value(db, call, key, data) == expected


def test_a_hash_is_that_of_the_text(db: psycopg.Connection) -> None:
    db.execute("SELECT spectrum.set_pii_key(%s)", (KEY,))
    for text in ("a", "ä€😀", "x" * 1000, "42", " "):
        assert value(db, "SELECT spectrum.pii_hash(%s)", text) == hashed(text)


def test_rules_hold_wherever_events_are_read(db: psycopg.Connection) -> None:
    define(db)
    insert(db, [PERSON, event(user_id=42), event(user_id="42"), event(user_id=""), event()])
    insert(db, [event(user_id={"x": ID}), event(properties={"revenue": MAIL, "email": None})])
    assert drain(db) == (7, 5 + 1, 0, 1)
    assert rows(db, "SELECT user_id, city, properties FROM analytics.events"
                    " WHERE event_type = 'visit'") == [
        (hashed(ID), None, {"email": hashed(MAIL), "plan": "pro", "billing": {}})
    ]  # fmt: skip
    assert value(db, "SELECT count(DISTINCT user_key) FROM warehouse.fact_events") == 4
    assert traces(db, ID) | traces(db, MAIL) | traces(db, CITY) == {"public.raw_events"}
    prove(db, views=True)


def test_capture_stores_nothing_in_clear(db: psycopg.Connection) -> None:
    define(db)
    value(db, "SELECT spectrum.capture(%s)", json.dumps(PERSON))
    for _ in range(2):
        assert traces(db, ID) | traces(db, MAIL) | traces(db, CITY) | traces(db, "IBAN-") == set()
        drain(db)
    insert(db, [PERSON | {"event_id": "f"}])
    assert drain(db).loaded == 1
    # By either door he is the same, hashed once.
    facts = rows(db, "SELECT user_id, properties ->> 'email' FROM analytics.events")
    assert facts == [(hashed(ID), hashed(MAIL))] * 2
    db.execute("CALL spectrum.reprocess(p_status => 'all')")
    drain(db)
    assert rows(db, "SELECT user_id, properties ->> 'email' FROM analytics.events") == facts
    prove(db, views=True)


def test_without_rules_capture_is_an_insert(db: psycopg.Connection) -> None:
    found = value(db, "SELECT spectrum.capture(%s)", json.dumps(PERSON))
    assert rows(db, "SELECT id, payload, treated FROM raw_events") == [(found, PERSON, None)]


def test_capture_takes_events_only(db: psycopg.Connection) -> None:
    for payload in (None, "[1]", '"ann"', "1"):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_payload") as call:
            db.execute("SELECT spectrum.capture(%s)", (payload,))
        assert call.value.diag.message_hint and "ann" not in str(call.value)


def test_who_may_capture_may_do_nothing_else(
    owner_db: psycopg.Connection, owner_dsn: str, make_role: MakeRole, connect: Connect
) -> None:
    define(owner_db, keep=True)
    name = make_role("capture")
    role = sql.Literal(sql.Identifier(name).as_string()).as_string()
    sender = connect(make_conninfo(owner_dsn, user=name))
    call = "SELECT spectrum.capture(%s)"
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        sender.execute(call, (json.dumps(PERSON),))
    owner_db.execute(f"SELECT spectrum.grant_capture({role}::regrole)")
    # Nor does a path of his own lead elsewhere.
    sender.execute("CREATE TEMPORARY TABLE privacy (rules jsonb)")
    sender.execute("CREATE FUNCTION pg_temp.jsonb_typeof(jsonb) RETURNS text LANGUAGE sql"
                   " AS $$ SELECT 'object' $$")  # fmt: skip
    sender.execute("SET search_path = pg_temp, public, spectrum")
    sender.execute(call, (json.dumps(PERSON),))
    for statement in (
        "INSERT INTO public.raw_events (payload) VALUES ('{}')",
        "INSERT INTO public.raw_events (payload, treated) VALUES ('{}', '{user_id}')",
        "SELECT payload FROM public.raw_events",
        "SELECT * FROM spectrum.pii_key",
        "SELECT * FROM spectrum.pii_values",
        "SELECT * FROM spectrum.pii_rules",
        "SELECT * FROM spectrum.privacy",
        "SELECT * FROM spectrum.forgotten",
        "SELECT spectrum.pii_hash('x')",
        "SELECT spectrum.set_pii_key()",
        "SELECT spectrum.define_pii('user_id', 'keep')",
        "SELECT spectrum.drop_pii('user_id')",
        "SELECT * FROM spectrum.forget_user('x')",
        "SELECT spectrum.remember_user('x')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            sender.execute(statement)
    assert traces(owner_db, ID) == {"spectrum.pii_values"}
    owner_db.execute(f"SELECT spectrum.revoke_capture({role}::regrole)")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        sender.execute(call, (json.dumps(PERSON),))


def test_what_was_kept_is_found_by_its_hash_and_forgotten_with_him(db: psycopg.Connection) -> None:
    define(db, keep=True)
    value(db, "SELECT spectrum.capture(%s)", json.dumps(PERSON))
    insert(db, [PERSON | {"event_id": "f"}, event(user_id="bob", properties={"email": "b@x"})])
    drain(db)
    kept = "SELECT field, value FROM spectrum.pii_values ORDER BY field, value"
    assert rows(db, kept) == [("properties.email", "b@x"), ("properties.email", MAIL),
                              ("user_id", ID), ("user_id", "bob")]  # fmt: skip
    assert (
        rows(
            db,
            "SELECT user_id FROM analytics.events JOIN spectrum.pii_values AS kept"
            " ON kept.hash = user_id WHERE kept.value = %s",
            ID,
        )
        == [(hashed(ID),)] * 2
    )
    db.execute("SELECT * FROM spectrum.forget_user(%s)", (ID,))
    assert rows(db, kept) == [("properties.email", "b@x"), ("user_id", "bob")]
    left = traces(db, ID) | traces(db, MAIL) | traces(db, hashed(ID)) | traces(db, hashed(MAIL))
    assert left == set()
    # He is kept out by either door.
    value(db, "SELECT spectrum.capture(%s)", json.dumps(PERSON))
    insert(db, [PERSON])
    assert drain(db).failed == 2
    assert traces(db, ID) | traces(db, MAIL) | traces(db, hashed(ID)) == set()
    prove(db, views=True)


@pytest.mark.parametrize("mode", ["remove", "anonymise"])
def test_who_is_dropped_can_be_forgotten(db: psycopg.Connection, mode: str) -> None:
    """His name is in raw events alone; his facts count for the unknown user."""
    db.execute("SELECT spectrum.define_pii('user_id', 'drop')")
    insert(db, [PERSON, event(user_id="bob")])
    drain(db)
    db.execute("SELECT * FROM spectrum.forget_user(%s, %s)", (ID, mode))
    assert traces(db, ID) == set()
    assert value(db, "SELECT count(*) FROM warehouse.fact_events") == (1 if mode == "remove" else 2)
    insert(db, [PERSON | {"event_id": "f"}])
    assert drain(db).failed == 1
    assert traces(db, ID) == set()
    prove(db, views=True)


def test_anonymised_he_is_not_hashed_again(db: psycopg.Connection) -> None:
    define(db)
    insert(db, [PERSON])
    drain(db)
    db.execute("SELECT * FROM spectrum.forget_user(%s, 'anonymise')", (ID,))
    db.execute("CALL spectrum.reprocess(p_status => 'done')")
    drain(db)
    (found,) = rows(db, "SELECT user_id, properties FROM analytics.events")
    assert found[0].startswith("anonymous-") and found[1] == {"plan": "pro", "billing": {}}
    assert traces(db, ID) | traces(db, MAIL) | traces(db, hashed(MAIL)) == set()
    prove(db, views=True)


def test_a_rule_for_what_is_there_already(db: psycopg.Connection) -> None:
    insert(db, [PERSON])
    db.execute("CALL spectrum.run()")
    notices: list[str] = []
    db.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
    define(db)
    assert "facts made before keep what they hold" in notices[0]
    wrong = rows(db, "SELECT check_name FROM spectrum.verify() WHERE NOT ok")
    assert wrong == [("facts equal what their raw events say",)]
    db.execute("CALL spectrum.reprocess(p_status => 'done')")
    db.execute("CALL spectrum.run()")
    prove(db, views=True)
    assert value(db, "SELECT spectrum.forget_members()") == 2  # the name and the place
    left = traces(db, ID) | traces(db, MAIL) | traces(db, CITY)
    assert left == {"public.raw_events"}
    assert value(db, "SELECT spectrum.forget_members()") == 0
    prove(db, views=True)
    db.execute("SELECT spectrum.drop_pii('user_id')")
    db.execute("CALL spectrum.reprocess(p_status => 'done')")
    drain(db)
    assert rows(db, "SELECT user_id FROM analytics.events") == [(ID,)]
    prove(db, views=True)


def test_what_the_caps_counted_of_an_account_names_it_no_more(db: psycopg.Connection) -> None:
    insert(db, [event("visit", account_id=ID, user_id="bob")])
    db.execute("CALL spectrum.run()")
    assert "spectrum.cap_notes" in traces(db, ID)
    # An account stays in use while it is the first one of a user.
    db.execute("SELECT spectrum.define_pii('user_id', 'hmac')")
    db.execute("SELECT spectrum.define_pii('account_id', 'hmac')")
    db.execute("CALL spectrum.reprocess(p_status => 'done')")
    db.execute("CALL spectrum.run()")
    assert value(db, "SELECT spectrum.forget_members()") == 2
    assert traces(db, ID) == {"public.raw_events"}
    prove(db, views=True)


def test_no_dump_holds_the_key(make_db: MakeDb, connect: Connect, tmp_path: Path) -> None:
    source = make_db("source", template="owner")
    with connect(source) as db:
        define(db, keep=True)
        insert(db, [PERSON])
        drain(db)
        insert(db, [event("visit", user_id="waits"), event("visit")])
        pads = rows(db, "SELECT secret::text, inner_pad::text, outer_pad::text"
                        " FROM spectrum.pii_key")[0]  # fmt: skip
    target = make_db("target", template="")
    run_sql(target, f'ALTER DATABASE "{conninfo_to_dict(target)["dbname"]}" OWNER TO {OWNER}')
    target += f" user={OWNER}"
    dump = tmp_path / "dump.sql"
    tool("pg_dump", source, "-f", str(dump))
    text = dump.read_text()
    assert not any(pad.removeprefix("\\x") in text for pad in pads)
    tool("psql", target, "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-f", str(dump))

    db = connect(target)
    health = "SELECT ok, message FROM spectrum.health() WHERE check_name = 'key of hashes'"
    assert rows(db, health) == [
        (False, "it is missing, as after a restore: events that need it wait")
    ]
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="key is missing"):
        db.execute("SELECT spectrum.capture(%s)", (json.dumps(PERSON),))
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="key is missing"):
        db.execute("SELECT * FROM spectrum.forget_user(%s)", (ID,))
    assert drain(db) == (2, 1, 0, 1)
    assert rows(db, "SELECT error_msg, next_attempt_at IS NOT NULL FROM raw_events"
                    " WHERE status = 'failed'") == [
        ("user_id: the PII key is missing (spectrum.set_pii_key)", True)
    ]  # fmt: skip
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="not the key") as call:
        db.execute("SELECT spectrum.set_pii_key(%s)", (KEY[::-1],))
    assert call.value.diag.message_hint
    db.execute("SELECT spectrum.set_pii_key(%s)", (KEY,))
    assert rows(db, health) == [(True, "it is the one that the hashes were made with")]
    db.execute("CALL spectrum.run()")
    assert statuses(db) == {"done": 3}
    insert(db, [PERSON | {"event_id": "f"}])
    drain(db)
    assert value(db, "SELECT count(*) FROM analytics.events WHERE user_id = %s", hashed(ID)) == 2
    prove(db, views=True)


def test_another_key_only_on_purpose(db: psycopg.Connection) -> None:
    define(db)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="not the key"):
        db.execute("SELECT spectrum.set_pii_key()")
    db.execute("SELECT spectrum.set_pii_key(%s, p_replace => true)", (KEY[::-1],))
    assert value(db, "SELECT spectrum.pii_hash('a')") != hashed("a")


def test_the_first_rule_makes_a_key(db: psycopg.Connection) -> None:
    health = "SELECT ok, message FROM spectrum.health() WHERE check_name = 'key of hashes'"
    assert rows(db, health) == [(True, "none is needed")]
    db.execute("SELECT spectrum.define_pii('user_id', 'hmac')")
    assert value(db, "SELECT length(secret) FROM spectrum.pii_key") == 32
    assert rows(db, health) == [(True, "it is the one that the hashes were made with")]


REFUSED: list[tuple[str, tuple[Any, ...], str]] = [
    ("define_pii", ("user_id", "mask"), 'p_rule: "mask"'),
    ("define_pii", (None, "drop"), "p_field"),
    ("define_pii", ("", "drop"), "p_field"),
    ("define_pii", ("event_id", "drop"), "p_field"),
    ("define_pii", ("occurred_at", "drop"), "p_field"),
    ("define_pii", ("user_id.x", "drop"), "p_field"),
    ("define_pii", ("properties", "hmac"), "p_field"),
    ("define_pii", ("properties..x", "hmac"), "p_field"),
    ("define_pii", ("properties.revenue", "hmac"), "p_rule"),
    ("define_pii", ("user_id", "drop", True), "p_keep"),
    ("drop_pii", ("user_id",), "p_field"),
    ("set_pii_key", (b"short",), "p_key"),
]


def test_what_makes_no_rule_is_refused(db: psycopg.Connection) -> None:
    for call, arguments, message in REFUSED:
        marks = ", ".join(["%s"] * len(arguments))
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=message) as raised:
            db.execute(f"SELECT spectrum.{call}({marks})", arguments)
        assert raised.value.diag.message_hint
