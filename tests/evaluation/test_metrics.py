"""Path errors and intervals: by hand, and against a second implementation in plain loops."""

import math

import numpy as np
import pytest

from flashdrive_node.evaluation import metrics
from flashdrive_node.evaluation.metrics import bootstrap_mean, bootstrap_ratio, compare, path_errors
from flashdrive_node.model.errors import InputError


def test_by_hand() -> None:
    # Driven: 1 m ahead per point, then a left turn. Sample 0 is 3 m ahead and 4 m to the left of it, sample 1 is right.
    truth = np.array([[[1.0, 0.0], [2.0, 0.0], [2.0, 1.0]]])
    yaw = np.array([[0.0, 0.0, math.pi / 2]])
    paths = np.stack((truth + np.array([3.0, 4.0]), truth), axis=1)
    found = path_errors(paths, truth, yaw, np.array([0]), dt_s=1.0, horizons_s=(1.0, 3.0))
    assert found["ade@1s"].tolist() == [2.5]
    assert found["ade@3s"].tolist() == [2.5]
    assert found["min_ade@3s"].tolist() == [0.0]
    assert found["fde@3s"].tolist() == [2.5]
    assert found["driven_ade@3s"].tolist() == [5.0]
    assert found["driven_fde@1s"].tolist() == [5.0]
    # At the last point the vehicle looks along y: 4 m ahead, and 3 m to the right.
    along, across = metrics.track_errors(paths, truth, yaw)
    np.testing.assert_allclose(along[0, 0], [3, 3, 4])
    np.testing.assert_allclose(across[0, 0], [4, 4, -3])
    np.testing.assert_allclose(found["along@3s"], [(3 + 3 + 4) / 3 / 2])
    np.testing.assert_allclose(found["across@3s"], [(4 + 4 + 3) / 3 / 2])


def _slow(paths: np.ndarray, truth: np.ndarray, yaw: np.ndarray, chosen: np.ndarray, count: int) -> list[list[float]]:
    """ade, min_ade, fde, min_fde, along, across, driven_ade, driven_fde of every window, point by point."""
    rows = []
    for w in range(len(paths)):
        means, lasts, along, across = [], [], 0.0, 0.0
        for s in range(paths.shape[1]):
            total = 0.0
            for k in range(count):
                dx, dy = paths[w, s, k, 0] - truth[w, k, 0], paths[w, s, k, 1] - truth[w, k, 1]
                total += math.hypot(dx, dy)
                heading = complex(math.cos(yaw[w, k]), math.sin(yaw[w, k]))
                turned = complex(dx, dy) / heading
                along, across = along + abs(turned.real), across + abs(turned.imag)
            means.append(total / count)
            lasts.append(math.hypot(dx, dy))
        points = count * paths.shape[1]
        sample = int(chosen[w])
        rows.append([sum(means) / len(means), min(means), sum(lasts) / len(lasts), min(lasts)])
        rows[-1] += [along / points, across / points, means[sample], lasts[sample]]
    return rows


def test_against_loops() -> None:
    rng = np.random.default_rng(0)
    paths, truth = rng.normal(size=(5, 3, 64, 3)), rng.normal(size=(5, 64, 3))
    yaw, chosen = rng.uniform(-4, 4, (5, 64)), rng.integers(0, 3, 5)
    found = path_errors(paths, truth, yaw, chosen)
    names = ("ade", "min_ade", "fde", "min_fde", "along", "across", "driven_ade", "driven_fde")
    for horizon, count in (("1s", 10), ("3s", 30), ("5s", 50), ("6.4s", 64)):
        ours = np.stack([found[f"{name}@{horizon}"] for name in names], axis=1)
        np.testing.assert_allclose(ours, _slow(paths, truth, yaw, chosen, count), rtol=1e-12)


def test_heights_do_not_count() -> None:
    truth, yaw = np.zeros((1, 64, 3)), np.zeros((1, 64))
    paths = truth[:, None] + np.array([0.0, 0.0, 9.0])
    assert not any(values.any() for values in path_errors(paths, truth, yaw).values())


def test_interval_of_a_known_distribution() -> None:
    # The mean of 400 normal numbers of deviation 2 has a standard error of 0.1; the interval is 1.96 of it each way.
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    found = bootstrap_mean(values)
    assert found.mean == pytest.approx(values.mean())
    error = values.std() / 20
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx((1.96 * error,) * 2, rel=0.1)
    assert found == bootstrap_mean(values)
    assert found.clips == 400


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(2)
    estimates = [bootstrap_mean(rng.exponential(1.0, 60), seed) for seed in range(100)]
    assert 85 <= sum(e.low <= 1.0 <= e.high for e in estimates) <= 100


def test_single_clip_has_no_width() -> None:
    assert bootstrap_mean([3.0]) == (3.0, 3.0, 3.0, 1)


def test_share() -> None:
    found = bootstrap_ratio([1, 0, 3], [10, 10, 20])
    assert found.mean == 0.1
    assert 0 <= found.low < found.mean < found.high <= 0.15


def test_paired_difference_is_narrower_than_the_clips() -> None:
    rng = np.random.default_rng(3)
    baseline = rng.uniform(1, 5, 50)
    found = compare(baseline * 1.1, baseline)
    assert found.relative.mean == pytest.approx(0.1)
    assert found.relative.low == pytest.approx(0.1)
    assert found.difference.mean == pytest.approx(0.1 * baseline.mean())
    apart = bootstrap_mean(baseline * 1.1)
    assert found.difference.high - found.difference.low < 0.2 * (apart.high - apart.low)
    noisy = compare(baseline + rng.normal(0, 1, 50), baseline)
    assert noisy.difference.low < 0 < noisy.difference.high


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": np.zeros((2, 1, 63, 2))}, r"paths \[2, 1, 63, 2\] do not fit the truth \[2, 64, 2\]"),
        ({"paths": np.full((2, 1, 64, 2), np.nan)}, r"paths: finite numbers are required.*windows \[0, 1\]"),
        ({"truth": np.zeros((2, 64))}, "truth .* are required"),
        ({"yaw": np.zeros((2, 63))}, r"headings \[2, 64\] are required, found \[2, 63\]"),
        ({"chosen": np.array([0, 1])}, r"chosen samples \[2\] below 1"),
        ({"horizons_s": (6.5,)}, "up to 6.4 s, found 6.5 s"),
        ({"horizons_s": (0.25,)}, "multiple of 0.1 s"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    given = {"paths": np.zeros((2, 1, 64, 2)), "truth": np.zeros((2, 64, 2)), "yaw": np.zeros((2, 64))} | change
    rest = {key: given.pop(key) for key in ("chosen", "horizons_s") if key in given}
    with pytest.raises(InputError, match=message):
        path_errors(given["paths"], given["truth"], given["yaw"], **rest)


def test_bad_clips() -> None:
    with pytest.raises(InputError, match="one finite value per clip"):
        bootstrap_mean([])
    with pytest.raises(InputError, match="one finite value per clip"):
        bootstrap_mean([1.0, math.inf])
    with pytest.raises(InputError, match="same clips"):
        compare([1.0], [1.0, 2.0])
    with pytest.raises(InputError, match="other than zero"):
        compare([1.0], [0.0])
    with pytest.raises(InputError, match="positive weights"):
        bootstrap_ratio([1.0], [0.0])
