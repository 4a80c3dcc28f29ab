from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashdrive_node.runtime.timing import StageTimings, percentile


def test_statistics_of_the_last_values() -> None:
    timings = StageTimings(window=100)
    for k in range(250):
        timings.add({"encode": float(k), "decode": 1.0} if k < 249 else {"encode": 249.0})
    found = timings.statistics()
    assert list(found) == ["encode", "decode"]
    encode = found["encode"]
    assert (encode.count, encode.last_ms, encode.max_ms) == (250, 249.0, 249.0)
    assert (encode.p50_ms, encode.p99_ms) == (200.0, 249.0)
    assert found["decode"].count == 249


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_percentile_is_one_of_the_values_with_as_many_below(values: list[float], fraction: float) -> None:
    found = percentile(sorted(values), fraction)
    assert found in values
    assert sum(v < found for v in values) <= fraction * len(values)


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"needs values and a fraction of 0 to 1, got 0 and 0.5"):
        percentile([], 0.5)
