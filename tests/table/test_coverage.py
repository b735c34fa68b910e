"""What a table holds, skipped and misses of its dataset, by definition and at scale."""

from __future__ import annotations

import time
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from crp.visualization.table.manifest import ShardRecord, get_coverage
from crp.visualization.table.shards import _get_earlier


def shard(start: int, stop: int, skipped: dict[int, str]) -> ShardRecord:
    return ShardRecord(f"{start}-{stop}-00000000.safetensors", "0" * 64, start, stop, 0, {}, skipped)


@st.composite
def shards_of(draw: st.DrawFn) -> list[ShardRecord]:
    found = []
    for start, n in draw(st.lists(st.tuples(st.integers(0, 25), st.integers(1, 12)), max_size=7)):
        skipped = draw(st.sets(st.integers(start, start + n - 1), max_size=4))
        found.append(shard(start, start + n, {i: f"{i} of {len(found)}" for i in skipped}))
    return sorted(found, key=lambda one: (one.start, one.stop))


@given(shards=shards_of(), start=st.integers(0, 20), n=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_every_sample_is_seen_or_missing_and_skipped_if_all_skip_it(
    shards: list[ShardRecord], start: int, n: int
) -> None:
    coverage = get_coverage(shards, start, start + n)
    seen, missing = ([i for a, b in ranges for i in range(a, b)] for ranges in (coverage.seen, coverage.missing))
    reached = {i for i in range(start, start + n) if any(s.start <= i < s.stop for s in shards)}
    assert seen == sorted(reached) and missing == sorted(set(range(start, start + n)) - reached)
    holding = {i: [s for s in shards if s.start <= i < s.stop] for i in reached}
    assert list(coverage.skipped) == sorted(i for i in reached if all(i in s.skipped for s in holding[i]))
    assert all(reason == holding[i][-1].skipped[i] for i, reason in coverage.skipped.items())


@given(shards=shards_of())
@settings(max_examples=60, deadline=None)
def test_earlier_shards_are_those_whose_ranges_overlap(shards: list[ShardRecord]) -> None:
    for number, (one, found) in enumerate(zip(shards, _get_earlier(shards), strict=True)):
        earlier = [s for s in shards[:number] if s.stop > one.start]
        assert (found is None) == (not earlier)
        if found is not None:
            assert found.stops.tolist() == sorted(s.stop for s in earlier)
            assert +found.skipped == Counter(i for s in earlier for i in s.skipped)


def test_thousands_of_shards_with_many_skipped_samples() -> None:
    """Each of 20 000 skipped samples against each of 5 000 shards takes several seconds."""
    shards = [shard(n * 10, n * 10 + 10, {n * 10 + i: "broken" for i in (1, 3, 5, 7)}) for n in range(5_000)]
    begin = time.process_time()
    coverage = get_coverage(shards, 0, 60_000)
    earlier = list(_get_earlier(shards))
    assert time.process_time() - begin < 2
    assert (len(coverage.skipped), coverage.seen, coverage.missing) == (20_000, [(0, 50_000)], [(50_000, 60_000)])
    assert not any(earlier)
