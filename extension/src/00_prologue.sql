\echo Use "CREATE EXTENSION spectrum" to load this file. \quit

-- Spectrum: product analytics inside PostgreSQL.
--
-- Data flows one way, through rooms in the order of their numbers:
--   10 config, 15 calendar     settings; the one place that cuts time
--   20 staging                 raw_events and how a payload is read
--   30 dimensions, 40 facts    the warehouse, filled by process_batch
--   50 rollups                 what changed since the last refresh
--   60 analytics               the questions, one file each
--   70 statistics, 71 experiments
--   80 operations              run, schedule, status, verify
--   90 privileges
--
-- This script creates schemas and functions. Tables and views are made by spectrum.setup(), which
-- the last line calls, and are then released from the extension: the data belongs to the user.

CREATE SCHEMA spectrum;
COMMENT ON SCHEMA spectrum IS
    'Spectrum: configuration, definitions, procedures and the state of the pipeline.';

CREATE SCHEMA warehouse;
COMMENT ON SCHEMA warehouse IS
    'Spectrum: the star schema. fact_events in the centre, dim_* around it.';

CREATE SCHEMA analytics;
COMMENT ON SCHEMA analytics IS
    'Spectrum: answers. The only schema that a dashboard reads.';
