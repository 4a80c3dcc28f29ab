"""A few minutes of driving in compressed time; ``python -m support.soak`` drives the hour."""

from __future__ import annotations

import pytest

from support.soak import Frames, drive

pytestmark = [pytest.mark.ros, pytest.mark.timeout(180)]


def test_nothing_leaks_and_nothing_is_lost(tmp_path, capsys):
    report = drive(tmp_path, windows=4500, seed=7)
    with capsys.disabled():
        print("\n" + report.table())
    assert report.unanswered == []
    assert report.resets >= 1
    first, last = report.samples[len(report.samples) // 5], report.samples[-1]
    assert report.growth_mb() < 3.0
    assert last.threads <= first.threads
    assert last.descriptors <= first.descriptors
    assert len(report.cameras) == 4
    for name, values in report.cameras.items():
        frames = Frames.of(values)
        assert frames.unaccounted == 0, (name, values)
        assert frames.received <= report.published[name]
        # The burst of a step fits the queues; at most a handful gets lost on the way into the node.
        assert frames.received >= 0.99 * report.published[name], (name, values)
        # What was planted is found under its cause.
        assert frames.dropped["duplicate"] > 0
    planted = [Frames.of(values).dropped for values in report.cameras.values()]
    for cause in ("corrupt", "refused", "not_needed"):
        assert sum(dropped[cause] for dropped in planted) > 0, (cause, planted)
