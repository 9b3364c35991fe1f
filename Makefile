# Spectrum: build, install, try, test.  `make help` lists the targets.

# The built script is the plain concatenation of this list, in this order.
SOURCES = $(addprefix extension/src/, \
	00_prologue.sql \
	10_config.sql \
	12_run_log.sql \
	13_horizon.sql \
	14_settings.sql \
	15_calendar.sql \
	18_temporary.sql \
	20_staging/00_raw_events.sql \
	20_staging/05_pii.sql \
	20_staging/06_forgotten.sql \
	20_staging/07_capture.sql \
	20_staging/10_reading.sql \
	20_staging/20_claiming.sql \
	20_staging/30_floods.sql \
	30_dimensions.sql \
	30_caps.sql \
	40_facts/00_facts.sql \
	40_facts/05_news.sql \
	40_facts/07_privacy.sql \
	40_facts/10_batch.sql \
	40_facts/15_load.sql \
	40_facts/20_process.sql \
	50_rollups/00_reports.sql \
	50_rollups/10_news.sql \
	60_analytics/00_tenants.sql \
	60_analytics/00_packed.sql \
	60_analytics/00_events.sql \
	60_analytics/05_ranges.sql \
	60_analytics/06_served_reports.sql \
	60_analytics/60_funnel_walks.sql \
	60_analytics/60_funnel_chains.sql \
	60_analytics/60_funnels.sql \
	60_analytics/60_funnels_kept.sql \
	60_analytics/60_funnels_sums.sql \
	60_analytics/60_funnels_frozen.sql \
	60_analytics/60_funnels_standing.sql \
	60_analytics/61_retention.sql \
	60_analytics/61_retention_kept.sql \
	60_analytics/61_retention_standing.sql \
	60_analytics/62_active_users.sql \
	60_analytics/62_active_users_standing.sql \
	60_analytics/62_lifecycle.sql \
	60_analytics/62_lifecycle_standing.sql \
	60_analytics/62_stickiness.sql \
	60_analytics/62_stickiness_standing.sql \
	60_analytics/63_trends.sql \
	60_analytics/63_daily_events.sql \
	60_analytics/64_revenue.sql \
	60_analytics/64_revenue_standing.sql \
	60_analytics/64_mrr.sql \
	60_analytics/64_mrr_report.sql \
	60_analytics/64_mrr_standing.sql \
	60_analytics/65_sessions.sql \
	60_analytics/65_attribution.sql \
	60_analytics/65_sessions_kept.sql \
	60_analytics/65_sessions_standing.sql \
	60_analytics/65_attribution_standing.sql \
	60_analytics/66_paths.sql \
	60_analytics/66_paths_standing.sql \
	60_analytics/67_feature_adoption.sql \
	60_analytics/67_cohorts.sql \
	60_analytics/67_feature_adoption_standing.sql \
	60_analytics/68_operations.sql \
	60_analytics/68_operations_kept.sql \
	60_analytics/68_operations_standing.sql \
	60_analytics/69_event_catalog.sql \
	60_analytics/69_reports.sql \
	60_analytics/69_event_catalog_standing.sql \
	70_statistics/incomplete_beta.sql \
	70_statistics/distributions.sql \
	70_statistics/tests.sql \
	70_statistics/methods.sql \
	71_experiments/00_definitions.sql \
	71_experiments/05_plan.sql \
	71_experiments/10_units.sql \
	71_experiments/15_totals.sql \
	71_experiments/20_results.sql \
	71_experiments/25_comparisons.sql \
	71_experiments/28_kept.sql \
	71_experiments/29_frozen.sql \
	71_experiments/30_standing.sql \
	72_glass/00_trace.sql \
	72_glass/10_counts.sql \
	72_glass/20_cohorts.sql \
	72_glass/30_funnels.sql \
	72_glass/40_experiments.sql \
	72_glass/50_sessions.sql \
	72_glass/51_attribution.sql \
	72_glass/51_paths.sql \
	72_glass/52_mrr.sql \
	72_glass/54_operations.sql \
	72_glass/56_activity.sql \
	72_glass/58_features.sql \
	72_glass/90_explain.sql \
	80_operations/00_refresh.sql \
	80_operations/05_tasks.sql \
	80_operations/10_run.sql \
	80_operations/20_schedule.sql \
	80_operations/25_surroundings.sql \
	80_operations/30_status.sql \
	80_operations/40_verify.sql \
	80_operations/51_pii_rules.sql \
	80_operations/52_reprocess.sql \
	80_operations/53_pack_facts.sql \
	80_operations/54_purge_raw.sql \
	80_operations/55_purge_facts.sql \
	80_operations/56_forget_user.sql \
	80_operations/57_erasure.sql \
	80_operations/57_erasure_packed.sql \
	80_operations/58_anonymise.sql \
	80_operations/59_receipts.sql \
	80_operations/85_migrations.sql \
	80_operations/90_setup.sql \
	90_privileges.sql \
	99_epilogue.sql \
)

# The regression tests, in the order of the rooms, and the two-session specs.
REGRESS = \
	10_config \
	15_calendar \
	20_staging \
	30_dimensions \
	40_facts \
	60_funnels \
	61_retention \
	62_active_users \
	62_lifecycle \
	62_stickiness \
	63_trends \
	64_revenue \
	64_mrr \
	65_sessions \
	66_paths \
	67_feature_adoption \
	68_operations \
	69_event_catalog \
	69_reports \
	70_statistics \
	71_experiments \
	72_glass \
	80_operations \
	90_privileges
ISOLATION = same_event newcomers months set_back refresh reports forget_user purge

SCRIPT = extension/spectrum--1.1.sql
# Former releases are frozen: no build touches them. UPDATE brings the last one to SCRIPT.
FROZEN = extension/spectrum--1.0.sql
UPDATE = extension/spectrum--1.0--1.1.sql
BEFORE_UPDATE = $(UPDATE:extension/spectrum--%=extension/updates/%)
UPDATE_PARTS = extension/updates/begin.sql $(BEFORE_UPDATE) extension/updates/end.sql \
	scripts/build-update
BUILD_DIR = build

# PostgreSQL 15 where Debian puts it, else whatever the PATH holds.
PG_CONFIG ?= $(firstword $(wildcard /usr/lib/postgresql/15/bin/pg_config) pg_config)

# PGXS: all, install, uninstall, installcheck, clean
EXTENSION = extension/spectrum
DATA = $(FROZEN) $(UPDATE) $(SCRIPT)
REGRESS_OPTS = --inputdir=regress --outputdir=$(BUILD_DIR)/regress
ISOLATION_OPTS = --inputdir=regress --outputdir=$(BUILD_DIR)/isolation
REGRESS_PREP = $(BUILD_DIR)/regress $(BUILD_DIR)/isolation
EXTRA_CLEAN = $(BUILD_DIR)

all: $(SCRIPT) $(UPDATE)

PGXS := $(shell $(PG_CONFIG) --pgxs 2>/dev/null)
ifneq ($(wildcard $(PGXS)),)
include $(PGXS)
else
install uninstall installcheck:
	@echo "make $@ needs PostgreSQL 15 (pg_config and its PGXS): scripts/prerequisites demo" >&2
	@false
endif

$(SCRIPT): $(SOURCES) Makefile
	cat $(SOURCES) > $@.new
	mv $@.new $@

$(UPDATE): $(FROZEN) $(SCRIPT) $(UPDATE_PARTS)
	scripts/build-update $(FROZEN) $(SCRIPT) $(BEFORE_UPDATE) > $@.new
	mv $@.new $@

$(BUILD_DIR)/regress $(BUILD_DIR)/isolation:
	mkdir -p $@

check-built:  ## prove that the committed scripts are the built ones
	@cat $(SOURCES) | cmp - $(SCRIPT) || { echo "$(SCRIPT) is not what its sources build: run make" >&2; exit 1; }
	@scripts/build-update $(FROZEN) $(SCRIPT) $(BEFORE_UPDATE) | cmp - $(UPDATE) || \
		{ echo "$(UPDATE) is not what its sources build: run make" >&2; exit 1; }

demo:  ## set up, load a month of events, let pg_cron work, show the views
	@scripts/demo

psql:  ## open psql on the demo
	@scripts/cluster run demo psql --dbname=spectrum

stop:  ## stop the servers of this checkout, keep their data
	@scripts/cluster stop

clean-demo:  ## stop the demo and remove its data
	@scripts/cluster remove demo

test:  ## everything: build, style, regress, pytest
	@scripts/test

test-faults:  ## 100 crashes on purpose, and the proof that nothing is lost (FAULTS="--rounds 8")
	@scripts/test-faults $(FAULTS)

test-all:  ## the same, then regress and pytest on PostgreSQL 16, 17 and 18
	@scripts/test-all

style:  ## the static checks alone
	@scripts/python-env test
	@scripts/style

test-poison:  ## payloads that mean harm, races, late events, at length (SPECTRUM_POISON payloads)
	@scripts/test-poison

bench:  ## from the INSERT to the answer, against what is to be reached (BENCH_EVENTS, BENCH_SUSTAIN)
	@scripts/bench

bench-refresh:  ## refreshes, views and questions at 1 and 10 million events (BENCH_EVENTS)
	@scripts/bench refresh

bench-history:  ## processing with 10 million events of history (BENCH_HISTORY)
	@scripts/bench history

bench-upkeep:  ## what caps and fair claiming, a flood, forgetting and purging cost (BENCH_EVENTS)
	@scripts/bench upkeep

bench-docs:  ## write the tables of docs/performance.md from bench/results/
	@scripts/bench document

soak:  ## load, process, refresh, purge for ten minutes (SOAK_SECONDS): what grows
	@scripts/bench soak

help:  ## this list
	@printf '%-18s  %s\n' make 'build $(SCRIPT) and the update to it' \
		'make install' 'install it into the server of $(PG_CONFIG)' \
		'make installcheck' 'pg_regress against the server of PGHOST, PGPORT, PGUSER'
	@sed -n 's/^\([a-z-]*\):  *## \(.*\)/make \1|\2/p' Makefile | \
		while IFS='|' read -r target what; do printf '%-18s  %s\n' "$$target" "$$what"; done

.PHONY: check-built demo psql stop clean-demo test test-faults test-poison test-all style \
	bench bench-refresh bench-history bench-upkeep bench-docs soak help
