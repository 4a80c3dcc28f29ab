"""History tokens equal the recording and a value-by-value computation; senseless histories are refused."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.history_tokens import decode_history, encode_history
from flashdrive_node.model.presets import alpamayo_1_5_10b
from support import oracle_small

CONFIG = alpamayo_1_5_10b()
START = 154669


def straight(speed=5.0):
    """16 poses along x at 10 Hz, the last one at the origin."""
    xyz = torch.zeros(16, 3)
    xyz[:, 0] = torch.arange(-15, 1) * 0.1 * speed
    return xyz, torch.eye(3).expand(16, 3, 3).clone()


def test_recorded_history():
    config = oracle_small.config()
    recorded, _ = oracle_small.case("onecam")
    inputs = oracle_small.inputs()
    ids = encode_history(inputs["ego_history_xyz"], inputs["ego_history_rot"], config)
    assert ids.shape == (1, 1, 48)
    prompt, fused = recorded["input_ids_prompt"][0], recorded["gen.input_ids_fused"][0]
    assert ids.flatten().tolist() == fused[prompt == config.tokens.history].tolist()


@given(st.lists(st.tuples(*[st.floats(-12, 12, width=32)] * 3), min_size=15, max_size=15))
def test_every_value_alone(positions):
    xyz = torch.tensor([*positions, (0.0, 0.0, 0.0)])
    ids = encode_history(xyz, straight()[1], CONFIG).tolist()
    expected, before = [], np.zeros(3, np.float32)
    for row in xyz.numpy():
        for value, limit in zip(row - before, (4, 4, 10), strict=True):
            fraction = (value + np.float32(limit)) / np.float32(2 * limit)
            # Python's round takes halves to the even neighbour.
            expected.append(START + min(max(round(float(fraction * np.float32(999))), 0), 999))
        before = row
    assert ids == expected


def test_halves_go_to_the_even_bin():
    bins = dataclasses.replace(CONFIG.history_tokenizer, ego_xyz_min=(0.0,) * 3, ego_xyz_max=(8.0,) * 3, num_bins=9)
    config = dataclasses.replace(CONFIG, history_tokenizer=bins)
    xyz, rot = torch.zeros(16, 3), straight()[1]
    xyz[0] = torch.tensor([0.5, 1.5, 2.5])
    assert encode_history(xyz, rot, config)[:3].tolist() == [START, START + 2, START + 2]


@given(st.lists(st.tuples(*[st.floats(-0.25, 0.25, width=32)] * 3), min_size=15, max_size=15))
def test_positions_come_back(steps):
    xyz = torch.cat((torch.zeros(1, 3), torch.tensor(steps).cumsum(0))).float()
    xyz -= xyz[-1].clone()
    back = decode_history(encode_history(xyz, straight()[1], CONFIG), CONFIG)
    half_bin = torch.tensor([4.0, 4.0, 10.0]) / 999
    assert ((back - xyz).abs() <= 16 * half_bin + 1e-4).all()


def test_decoding_refuses_other_tokens():
    with pytest.raises(InputError, match="48 are required, found 47"):
        decode_history(torch.full((47,), START), CONFIG)
    with pytest.raises(InputError, match=f"ids {START} to {START + 999} are required, found {START - 1} to"):
        decode_history(torch.full((48,), START - 1), CONFIG)


def broken(change):
    xyz, rot = straight()
    return change(xyz, rot) or (xyz, rot)


def set_at(array, index, value):
    array[index] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda xyz, rot: (xyz[1:], rot[1:]),
            "positions [..., 16, 3] and rotations [..., 16, 3, 3] are required, found [15",
        ),
        (lambda xyz, rot: (xyz, rot[:, 0]), "found [16, 3] and [16, 3]"),
        (lambda xyz, rot: (xyz.long(), rot), "floating point is required, found torch.int64"),
        (lambda xyz, rot: set_at(xyz, (3, 1), math.nan), "found NaN or infinity in pose 3"),
        (lambda xyz, rot: set_at(rot, (4, 0, 0), math.inf), "found NaN or infinity in pose 4"),
        (lambda xyz, rot: set_at(rot, (5, 0, 0), 1.1), "pose 5 is not a rotation"),
        (lambda xyz, rot: set_at(rot, (6, 2, 2), -1.0), "pose 6 is not a rotation"),
        (
            lambda xyz, rot: (xyz + 0.5, rot),
            "the last position must be the origin (tolerance 0.001 m), found 0.5 m away",
        ),
        (
            lambda xyz, rot: (xyz, torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]).expand(16, 3, 3)),
            "the last rotation must be the identity (tolerance 0.001), found 1 off",
        ),
    ],
)
def test_histories_that_are_refused(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        encode_history(*broken(change), CONFIG)


def test_all_problems_of_a_history_are_listed():
    xyz, rot = straight()
    rot[2] *= 2
    with pytest.raises(InputError, match=r"pose 2 is not a rotation.*the last position must be the origin"):
        encode_history(xyz + 1, rot, CONFIG)
