-- Room 10: settings are checked by what they mean, and every refusal looks the same.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS spectrum;
RESET client_min_messages;

-- One row, with defaults that fit most.
SELECT batch_size, timezone, week_start, currency, revenue_property, refund_events, max_attempts
FROM spectrum.config;

-- A setting is set by its name and returned as stored.
SELECT spectrum.configure('batch_size', '500');
SELECT spectrum.configure('timezone', 'Europe/Berlin');
SELECT spectrum.configure('refund_events', '{refund,chargeback}');
SELECT batch_size, timezone, refund_events FROM spectrum.config;

-- Refused: an unknown setting, a value of the wrong type, one out of range, one unknown, none.
\set VERBOSITY default
SELECT spectrum.configure('batch', '500');
SELECT spectrum.configure('batch_size', 'many');
SELECT spectrum.configure('batch_size', '0');
SELECT spectrum.configure('timezone', 'Mars/Olympus');
SELECT spectrum.configure('currency', 'euro');
SELECT spectrum.configure('week_start', NULL);
SELECT spectrum.configure('is_only', 'false');
SELECT spectrum.configure(E'x"; DROP TABLE spectrum.config; --', '1');
\set VERBOSITY terse

-- There is no second row.
INSERT INTO spectrum.config (is_only) VALUES (false);
INSERT INTO spectrum.config DEFAULT VALUES;

-- The three refusals that all rooms share.
\set VERBOSITY default
SELECT spectrum._reject('p_color', 'blue', 'red or green');
SELECT spectrum._check_choice('p_color', NULL, '{red, green}');
SELECT spectrum._check_name('p_name', repeat('x', 64));
\set VERBOSITY terse

SELECT spectrum.configure('batch_size', '10000'), spectrum.configure('timezone', 'UTC'),
    spectrum.configure('refund_events', '{refund}');
