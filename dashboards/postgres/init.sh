#!/bin/bash
# Makes the extension, the reader that Grafana comes as, and the schedule. Safe to source: the
# image's entry point runs a script that is executable, and sources one that is not.
psql -X -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
    -v reader_password="$SPECTRUM_READER_PASSWORD" <<'SQL'
CREATE EXTENSION pg_cron;
CREATE EXTENSION spectrum;
CREATE ROLE grafana LOGIN PASSWORD :'reader_password' CONNECTION LIMIT 20;
ALTER ROLE grafana SET default_transaction_read_only = on;
ALTER ROLE grafana SET statement_timeout = '30s';
SELECT spectrum.grant_reader('grafana');
SELECT spectrum.schedule();
SQL
