"""Flow schedules against the plain loop, against their definition in float64, and the search against trying all."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdrive_node.engine.flow_schedule import PUBLISHED_8, PUBLISHED_10, FlowSchedule, best_schedule, integrate
from flashdrive_node.model import flow_matching
from flashdrive_node.model.errors import InputError

QUICK = settings(max_examples=60, deadline=None)


class Field:
    """A smooth velocity field; counts its evaluations."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(2, 2, generator=generator, dtype=torch.float64).to(dtype)
        self.times: list[float] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.times.append(float(t))
        return torch.tanh(x @ self.mix.to(x.dtype)) + torch.sin(5 * t.to(x.dtype)) * x


def noise(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 5, 2, generator=torch.Generator().manual_seed(seed + 1))


@st.composite
def schedules(draw) -> FlowSchedule:
    steps = draw(st.integers(1, 12))
    others = draw(st.sets(st.integers(1, steps - 1))) if steps > 1 else set()
    evaluated = (0, *sorted(others))
    fill = draw(st.sampled_from(["hold", "linear"]))
    if draw(st.booleans()):
        return FlowSchedule.uniform(steps, evaluated, fill)
    inner = draw(st.sets(st.integers(1, 99), min_size=steps - 1, max_size=steps - 1))
    return FlowSchedule((0.0, *(i / 100 for i in sorted(inner)), 1.0), evaluated, fill)


def by_definition(schedule: FlowSchedule, velocity, x: torch.Tensor) -> torch.Tensor:
    """Step by step in float64, each with a velocity of its own."""
    x = x.double()
    known: list[tuple[float, torch.Tensor]] = []
    for i in range(schedule.steps):
        t = schedule.times[i]
        if i in schedule.evaluated:
            v = velocity(x, torch.tensor(t, dtype=torch.float64))
            known.append((t, v))
        elif schedule.fill == "hold" or len(known) == 1:
            v = known[-1][1]
        else:
            (t0, v0), (t1, v1) = known[-2:]
            v = v1 + (v1 - v0) * (t - t1) / (t1 - t0)
        x = x + (schedule.times[i + 1] - t) * v
    return x


@QUICK
@given(steps=st.integers(1, 20), seed=st.integers(0, 999), fill=st.sampled_from(["hold", "linear"]))
def test_full_schedule_is_the_plain_loop(steps, seed, fill):
    expected = flow_matching.integrate(Field(seed), noise(seed), steps)
    table = FlowSchedule.uniform(steps, fill=fill).table()
    torch.testing.assert_close(integrate(Field(seed), noise(seed), table).action, expected, rtol=0, atol=0)


@QUICK
@given(schedule=schedules(), seed=st.integers(0, 999))
def test_cached_schedule_equals_its_definition_in_float64(schedule, seed):
    field = Field(seed)
    found = integrate(field, noise(seed), schedule.table())
    expected = by_definition(schedule, Field(seed, torch.float64), noise(seed))
    # Extrapolation over long gaps multiplies rounding with the states it reaches.
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.action.double() / scale, expected / scale, rtol=0, atol=2e-4)
    torch.testing.assert_close(torch.tensor(field.times), torch.tensor([schedule.times[i] for i in schedule.evaluated]))


@QUICK
@given(schedule=schedules(), seed=st.integers(0, 999), weight=st.floats(0, 3))
def test_guided_velocity_is_cached_like_any_other(schedule, seed, weight):
    """Guidance mixes two fields before caching: the mixed field's definition holds."""
    guided = flow_matching.guided(Field(seed), Field(seed + 1), weight)
    exact = flow_matching.guided(Field(seed, torch.float64), Field(seed + 1, torch.float64), weight)
    found = integrate(guided, noise(seed), schedule.table()).action
    expected = by_definition(schedule, exact, noise(seed))
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=2e-3)


def test_published_schedules():
    assert PUBLISHED_8.table().tolist() == [[0, 0.125, 0], [0.125, 0.125, 0], [0.25, 0.625, 0], [0.875, 0.125, 0]]
    assert PUBLISHED_10.table()[:, 0].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert PUBLISHED_10.table()[:, 1].tolist() == pytest.approx([0.2] * 5)
    assert FlowSchedule.parse("8:0,1,2,7") == PUBLISHED_8
    assert FlowSchedule.parse("10:0,2,4,6,8:linear") == FlowSchedule.uniform(10, (0, 2, 4, 6, 8), "linear")
    assert FlowSchedule.parse("10") == FlowSchedule.uniform(10)
    assert FlowSchedule.parse("0,0.25,1:0") == FlowSchedule((0, 0.25, 1), (0,))


def test_error_is_the_difference_of_the_last_two_velocities():
    values = iter([torch.zeros(2, 3, 2), torch.ones(2, 3, 2), torch.tensor([4.0, -1.0])[:, None, None].expand(2, 3, 2)])
    result = integrate(lambda x, t: next(values), torch.zeros(2, 3, 2), FlowSchedule.uniform(3).table())
    assert result.error.tolist() == [3.0, 2.0]
    single = integrate(lambda x, t: x, torch.zeros(2, 3, 2), FlowSchedule.uniform(5, (0,)).table())
    assert bool(single.error.isnan().all())


def cost_of(schedule: FlowSchedule, v: torch.Tensor) -> float:
    """The cost that the search minimises, summed step by step."""
    total, v = 0.0, v.double()
    for k, first in enumerate(schedule.evaluated):
        end = schedule.evaluated[k + 1] if k + 1 < len(schedule.evaluated) else schedule.steps
        lack = torch.zeros_like(v[:, 0])
        for i in range(first, end):
            used = v[:, first]
            if schedule.fill == "linear" and k > 0:
                before = schedule.evaluated[k - 1]
                span = schedule.times[first] - schedule.times[before]
                used = used + (v[:, first] - v[:, before]) * (schedule.times[i] - schedule.times[first]) / span
            lack += (schedule.times[i + 1] - schedule.times[i]) * (v[:, i] - used)
        total += float(lack.square().mean().sqrt())
    return total


@QUICK
@given(steps=st.integers(1, 7), data=st.data(), seed=st.integers(0, 999), fill=st.sampled_from(["hold", "linear"]))
def test_search_finds_the_best_of_all(steps, data, seed, fill):
    evaluations = data.draw(st.integers(1, steps))
    velocities = torch.randn(3, steps, 4, 2, generator=torch.Generator().manual_seed(seed))
    schedule, cost = best_schedule(velocities, evaluations, fill=fill)
    others = [(0, *rest) for rest in itertools.combinations(range(1, steps), evaluations - 1)]
    costs = [cost_of(FlowSchedule.uniform(steps, e, fill), velocities) for e in others]
    assert len(schedule.evaluated) == evaluations
    assert cost == pytest.approx(min(costs), rel=1e-6, abs=1e-12)
    assert cost_of(schedule, velocities) == pytest.approx(cost, rel=1e-6, abs=1e-12)


@QUICK
@given(seed=st.integers(0, 999), evaluations=st.integers(1, 7))
def test_cost_bounds_the_displacement_of_the_action(seed, evaluations):
    """With velocities that do not depend on the state, the bound is a bound on the action itself."""
    velocities = torch.randn(6, 8, 2, generator=torch.Generator().manual_seed(seed))
    schedule, cost = best_schedule(velocities, evaluations)
    full = (velocities / 8).sum(dim=1)
    at = {round(i / 8, 4): i for i in range(8)}
    reached = integrate(lambda x, t: velocities[:, at[round(float(t), 4)]], torch.zeros(6, 2), schedule.table())
    assert float((reached.action - full).square().mean().sqrt()) <= cost + 1e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "at least 1 step is required"),
        ("8:1,2", r"must start with 0.*found \[1, 2\]"),
        ("8:0,2,2", "must start with 0, ascend"),
        ("8:0,8", "stay below 8"),
        ("8:0:cubic", "fill must be one of"),
        ("0,0.5,0.5,1:0", "times must ascend from 0 to 1"),
        ("eight", "'STEPS:EVALUATED:FILL' is required, found 'eight'"),
    ],
)
def test_bad_schedules_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        FlowSchedule.parse(text)


def test_bad_recordings_are_refused():
    with pytest.raises(InputError, match=r"\[recordings, steps, ...\] are required, found \[0, 3\]"):
        best_schedule(torch.zeros(0, 3), 2)
    with pytest.raises(InputError, match="evaluations must be 1 to 3"):
        best_schedule(torch.zeros(1, 3), 4)
    with pytest.raises(InputError, match="times: 4 are required"):
        best_schedule(torch.zeros(1, 3), 1, (0, 1))
