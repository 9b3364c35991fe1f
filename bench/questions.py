"""The definitions that stand in the benches."""

from __future__ import annotations

FUNNEL = '["signup", "project_created", "purchase"]'
DEFINITIONS = f"""
SELECT spectrum.define_funnel('activation', '{FUNNEL}', p_window => '7 days');
SELECT spectrum.define_funnel(
    'adoption', '["page_view", "feature_used", "purchase"]', p_window => '1 day');
SELECT spectrum.define_retention('buyers', 'signup', 'purchase');
SELECT spectrum.define_metric('buying', 'proportion', 'purchase');
SELECT spectrum.define_experiment(
    'checkout', '{{"control": 0.5, "treatment": 0.5}}', 'control', '["buying"]');
"""
