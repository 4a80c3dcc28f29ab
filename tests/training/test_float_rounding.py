"""Weights in 8-bit floats that make up for each other: closer on the inputs they are for, and exact for any reader."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.fp8 import Fp8Linear, round_rows
from flashdrive_node.training.compensation import compensated, fitted_to
from flashdrive_node.training.float_rounding import fit_float, output_error, round_by_rows


def _correlated(rows: int, columns: int, seed: int) -> Tensor:
    """Inputs most of whose variance lies in a quarter of the directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(max(1, columns // 4), columns, generator=generator)
    inputs = torch.randn(rows, len(directions), generator=generator) @ directions
    return inputs + 0.1 * torch.randn(rows, columns, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 70),
    exponent=st.integers(-20, 10),
    zero_rows=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_reader_finds_the_same_values(rows: int, columns: int, exponent: int, zero_rows: bool, seed: int) -> None:
    """In bfloat16 and behind a row-wise rounding to e4m3 that knows nothing of how the values were chosen."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 2.0**exponent
    weight[::3] *= 0.0 if zero_rows else 1.0
    found = round_by_rows(weight, _correlated(50, columns, seed))
    assert torch.equal(found.bfloat16().float(), found)
    codes, scales = round_rows(found)
    assert torch.equal(codes.float() * scales, found)
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = found.bfloat16()
    assert torch.equal(Fp8Linear(layer).dequantised(), found)


@pytest.mark.parametrize("seed", range(3))
def test_outputs_change_less_on_other_inputs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(96, 256, generator=generator)
    inputs = _correlated(1500, 256, seed)
    done = fit_float(weight, inputs[:1000], inputs[1000:])
    assert done.error < 0.5 * done.nearest_error
    assert done.error == output_error(done.weight, weight, inputs[1000:])


def test_inputs_of_no_use_leave_the_weight_as_it_is() -> None:
    """Made up for on inputs that say nothing of the others: rounding to the nearest is better, and readers do that."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    inputs, others = torch.zeros(40, 64), torch.randn(200, 64, generator=generator)
    inputs[:, :4] = torch.randn(40, 4, generator=generator) + 3
    done = fit_float(weight, inputs, others)
    assert done.error == done.nearest_error
    assert torch.equal(done.weight, weight)


def test_against_one_column_after_the_other() -> None:
    """The blocked recursion is the textbook's: weights that are left follow from the inverse of what is left."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 150, generator=generator, dtype=torch.float64)
    inputs = _correlated(400, 150, 1).double()
    moment = inputs.T @ inputs / len(inputs)
    moment += 0.01 * moment.diagonal().mean() * torch.eye(150, dtype=torch.float64)
    left, order = weight.clone(), moment.diagonal().argsort(descending=True).tolist()
    expected = torch.empty_like(weight)
    for place, column in enumerate(order):
        behind = order[place:]
        inverse = torch.linalg.inv(moment[behind][:, behind])
        expected[:, column] = (left[:, column] * 2).round() / 2
        error = (left[:, column] - expected[:, column]) / inverse[0, 0]
        left[:, behind] -= error[:, None] * inverse[0]
    found = compensated(weight.float(), inputs.float(), lambda values, _: (values * 2).round() / 2)
    # Values half-way between two may go either way in float32, and take others along.
    assert (found.double() == expected).double().mean() > 0.98
    exact = inputs @ weight.T
    errors = [float((inputs @ w.double().T - exact).norm()) for w in (found, expected, (weight * 2).round() / 2)]
    np.testing.assert_allclose(errors[0], errors[1], rtol=0.02)
    assert errors[0] < 0.7 * errors[2]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    samples=st.integers(1, 200),
    noise=st.floats(0, 1),
    damping=st.floats(1e-3, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_matrix_makes_up_for_what_its_inputs_are_off_by(
    rows: int, columns: int, samples: int, noise: float, damping: float, seed: int
) -> None:
    """The minimum of the squared error and the distance from the old matrix: nothing near it has less of both."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    exact = _correlated(samples, columns, seed)
    inputs = exact + noise * torch.randn(samples, columns, generator=generator)
    wanted = exact @ weight.T
    held = damping * inputs.double().square().mean()

    def cost(matrix: Tensor) -> float:
        error = (inputs.double() @ matrix.double().T - wanted.double()).square().sum() / samples
        return float(error + held * (matrix - weight).double().square().sum())

    found = fitted_to(weight, inputs, wanted, damping)
    least = cost(found)
    assert least <= cost(weight) * (1 + 1e-6) + 1e-6
    for _ in range(5):
        assert least <= cost(found + 0.01 * torch.randn(rows, columns, generator=generator)) + 1e-6


@pytest.mark.parametrize("inputs", [torch.full((3, 8), torch.nan), torch.zeros(0, 8)])
def test_inputs_that_cannot_be_used(inputs: Tensor) -> None:
    with pytest.raises(InputError, match="finite inputs, one row or more"):
        fit_float(torch.ones(4, 8), inputs, torch.ones(2, 8))
