\echo Use "ALTER EXTENSION spectrum UPDATE" to load this file. \quit

-- Built by scripts/build-update: first go the functions that are gone or whose head changed, but
-- for those that something stands on; then all functions are replaced; then setup() brings the
-- tables and views to this release; then goes what had to stay for the views before.
SET LOCAL search_path = pg_catalog, pg_temp;
