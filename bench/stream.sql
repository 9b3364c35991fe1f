-- A made-up stream of events, the same for the same arguments, made inside the server. Event n has a
-- place in it, and all about it is a hash of n or of its session: no random(), no order to keep.
--
-- Events come in sessions of 1 to 20. Users join over the first days_of_joining days and stay; the
-- newest are met a little more often than the old, and of 16 neighbours the first makes 40 % of the
-- events. One user in 25,000 is heavy: these make a fifth of all events, which is 100,000 each
-- where a user has 20 events on average. What lies beyond the history is one more day of the same:
-- a tenth of its sessions come late, by up to 30 days, and 3 % are of new users.
--
-- A payload has about 365 bytes of text, or 1,000 where the history is of wide events.

CREATE SCHEMA bench;

CREATE TABLE bench.history (
    events bigint NOT NULL,
    users bigint NOT NULL,
    accounts integer NOT NULL,
    begins_at timestamptz NOT NULL,
    ends_at timestamptz NOT NULL,
    days_of_joining double precision NOT NULL,
    is_wide boolean NOT NULL
);

CREATE FUNCTION bench.chance(p_number bigint, p_salt bigint)
RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$
    SELECT (hashint8extended(p_number, p_salt) & 4503599627370495) / 4503599627370496.0::float8
$$;
COMMENT ON FUNCTION bench.chance(bigint, bigint) IS 'A number of [0, 1) that looks random.';

CREATE FUNCTION bench.details(p_number bigint)
RETURNS jsonb
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$
    SELECT jsonb_build_object(
        'url', 'https://app.example.com/projects/' || p_number % 397 || '/board?card='
            || md5('card ' || p_number % 5003),
        'referrer', 'https://search.example/?q=product+analytics&page=' || p_number % 7,
        'title', 'Board of project ' || p_number % 397 || ' - Example',
        'user_agent', 'Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) '
            'Chrome/126.0.' || p_number % 211 || '.0 Safari/537.36',
        'page_view_id', md5('page ' || p_number / 5),
        'device_id', md5('device ' || p_number / 64),
        'theme', (ARRAY['dark', 'light'])[p_number / 64 % 2 + 1],
        'screen', (ARRAY['1920x1080', '1440x900', '390x844'])[p_number % 3 + 1],
        'locale', (ARRAY['de-DE', 'en-US', 'fr-FR'])[p_number % 3 + 1],
        'campaign', jsonb_build_object('source', 'newsletter', 'medium', 'email',
            'name', 'spring-' || p_number % 13),
        'is_first_visit', p_number % 20 = 0,
        'scroll_depth', p_number % 101,
        'experiments', jsonb_build_array('nav-' || p_number % 3, 'price-' || p_number % 2)
    )
$$;
COMMENT ON FUNCTION bench.details(bigint) IS 'What wide events say besides.';

CREATE FUNCTION bench.events(p_first bigint, p_last bigint)
RETURNS TABLE (
    number bigint, event_id uuid, occurred_at timestamptz, event_type text, account_id text,
    user_id text, country text, city text, properties jsonb
)
LANGUAGE sql STABLE PARALLEL SAFE
SET jit = off
AS $$
    SELECT
        s.number,
        md5('event ' || s.number)::uuid,
        -- Whole milliseconds, as senders have them.
        date_trunc('milliseconds',
            t.starts_at + 30 * (s.place + bench.chance(s.number, 1)) * interval '1 second'),
        k.event_type,
        'account-' || u."user" % s.accounts,
        'user-' || u."user",
        (ARRAY['DE', 'US', 'FR'])[u."user" % 3 + 1],
        (ARRAY['Berlin', 'San Jose', 'Lyon'])[u."user" % 3 + 1],
        jsonb_build_object(
            'plan', (ARRAY['free', 'team', 'pro'])[u."user" % 3 + 1],
            'path', '/projects/' || s.number % 397 || '/board',
            'build', '2026.' || s.number / 50000 % 100
        ) || CASE k.event_type
            WHEN 'purchase' THEN jsonb_build_object('revenue', 5 + s.number % 19500 / 100.0)
            WHEN 'feature_used' THEN jsonb_build_object('feature', 'feature-' || s.number % 12)
            WHEN 'api_request' THEN jsonb_build_object('latency_ms', 5 + s.number % 890)
            WHEN 'experiment_exposure' THEN jsonb_build_object('experiment', 'checkout',
                'variant', CASE WHEN bench.chance(u."user", 9) < 0.5
                    THEN 'control' ELSE 'treatment' END)
            ELSE '{}'
        END || CASE WHEN s.is_wide THEN bench.details(s.number) ELSE '{}' END
    FROM (
        SELECT e.number, e.number / 64 * 8 + c.at AS session,
            e.number % 64 - c.starts[c.at] AS place, h.*, e.number >= h.events AS is_new
        FROM generate_series(p_first, p_last) AS e (number)
        CROSS JOIN LATERAL (
            SELECT l.starts, width_bucket(e.number % 64, l.starts) AS at
            FROM (VALUES ('{0, 1, 3, 6, 12, 20, 30, 44}'::bigint[])) AS l (starts)
        ) AS c
        CROSS JOIN bench.history AS h
    ) AS s
    CROSS JOIN LATERAL (
        SELECT CASE
            WHEN NOT s.is_new THEN s.begins_at + (s.ends_at - s.begins_at)
                * least(1, (s.session * 8.0 / s.events + bench.chance(s.session, 2) / 1000))
            WHEN bench.chance(s.session, 3) < 0.1 THEN s.ends_at - interval '30 days'
                * bench.chance(s.session, 4) ^ 3
            ELSE s.ends_at + interval '20 hours' * bench.chance(s.session, 4)
        END AS starts_at
        OFFSET 0
    ) AS t
    CROSS JOIN LATERAL (
        SELECT CASE
            WHEN bench.chance(s.session, 5) < 0.2
                THEN floor(greatest(s.users / 25000, 1) * bench.chance(s.session, 6))
            WHEN s.is_new AND bench.chance(s.session, 5) > 0.97 THEN s.users + s.session
            ELSE floor(s.users / 16 * (1 - bench.chance(s.session, 6) ^ 1.5) * least(
                    1, 0.2 + 0.8 * extract(epoch FROM t.starts_at - s.begins_at)
                        / 86400 / s.days_of_joining
                )) * 16 + floor(16 * bench.chance(s.session, 7) ^ 3)
        END::bigint AS "user"
        OFFSET 0
    ) AS u
    CROSS JOIN LATERAL (
        SELECT l.event_types[width_bucket(bench.chance(s.number, 8), l.shares)] AS event_type
        FROM (
            VALUES (
                '{0, .53, .73, .88, .92, .96, .98}'::float8[],
                '{page_view, feature_used, api_request, signup, project_created, purchase,
                experiment_exposure}'::text[]
            )
        ) AS l (shares, event_types)
        OFFSET 0
    ) AS k
$$;
COMMENT ON FUNCTION bench.events(bigint, bigint) IS 'The events p_first to p_last of the stream.';

CREATE FUNCTION bench.payloads(p_first bigint, p_last bigint)
RETURNS SETOF jsonb
LANGUAGE sql STABLE PARALLEL SAFE
AS $$
    SELECT jsonb_build_object(
        'event_id', e.event_id, 'event_type', e.event_type, 'account_id', e.account_id,
        'user_id', e.user_id,
        'occurred_at', to_json(e.occurred_at AT TIME ZONE 'UTC') #>> '{}' || 'Z',
        'geo', jsonb_build_object('country', e.country, 'city', e.city),
        'library', jsonb_build_object('name', 'example-web', 'version', '2.11.4'),
        'properties', e.properties
    )
    FROM bench.events(p_first, p_last) AS e
$$;
COMMENT ON FUNCTION bench.payloads(bigint, bigint) IS 'The same as clients send them.';

CREATE FUNCTION bench.load(p_first bigint, p_last bigint)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET datestyle = 'ISO'
SET jit = off
AS $$
BEGIN
    PERFORM spectrum._clear_batch();
    INSERT INTO pg_temp.spectrum_batch (
        seq, event_id, occurred_at, event_type, account_id, user_id, country, region, city,
        account_key, user_key, geo_key, event_type_key, properties, revenue, currency, is_readable
    )
    SELECT e.number + 1, e.event_id, e.occurred_at, e.event_type, e.account_id, e.user_id,
        e.country, '', e.city,
        accounts.account_key, users.user_key, geography.geo_key, event_types.event_type_key,
        e.properties, (e.properties -> 'revenue')::numeric,
        CASE WHEN e.properties ? 'revenue' THEN 'USD' END, true
    FROM bench.events(p_first, p_last) AS e
    LEFT JOIN warehouse.dim_accounts AS accounts USING (account_id)
    LEFT JOIN warehouse.dim_users AS users USING (user_id)
    LEFT JOIN warehouse.dim_geography AS geography ON geography.country = e.country
        AND geography.region = '' AND geography.city = e.city
    LEFT JOIN warehouse.dim_event_types AS event_types USING (event_type);
    PERFORM spectrum._add_months(min(batch.occurred_at), max(batch.occurred_at))
    FROM pg_temp.spectrum_batch AS batch;
    PERFORM spectrum._add_members();
    RETURN spectrum._insert_facts();
END
$$;
COMMENT ON FUNCTION bench.load(bigint, bigint) IS
    'Loads them as a batch does, by the same steps, but without a raw event each: what is left '
    'after spectrum.purge_raw. Three times as fast.';
