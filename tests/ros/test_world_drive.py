"""The world drives through the real node over DDS: as in process where nothing is lost, and safely where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from std_msgs.msg import String

from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.evaluation.closed_loop import ClosedLoop
from flashdrive_node.ros.driver_link import DriverError
from flashdrive_node.ros.engines import choose_engine
from flashdrive_node.ros.parameters import parameters_from
from flashdrive_node.runtime.rig import load_rig
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.scenario import sample_scenes
from support.node_process import Bench, wait_until
from support.recorded_network import RECORDED_NETWORK
from support.vehicle import Camera, write_rig
from support.world_drives import SLOW_SCENE, begin, driving_node, real_time, world

pytestmark = [pytest.mark.ros, pytest.mark.timeout(240)]


@pytest.fixture
def one_camera(tmp_path) -> Path:
    return write_rig(tmp_path, [Camera("front", 1, width=32, height=16)])


@pytest.fixture
def four_cameras(tmp_path_factory) -> Path:
    names = {0: "left", 1: "front", 2: "right", 6: "tele"}
    cameras = [Camera(name, index, width=96, height=64) for index, name in names.items()]
    return write_rig(tmp_path_factory.mktemp("four"), cameras)


def observation(loop: ClosedLoop, indices: list[int], number: int) -> Observation:
    """The window of a loop in process, as an engine takes it."""
    seen = loop.observe()
    assert seen.images is not None
    stamps = tuple(10**9 + (number - k) * 100_000_000 for k in (3, 2, 1, 0))
    frames = seen.images[0].numpy()
    cameras = (CameraFrames(i, stamps, tuple(pictures)) for i, pictures in zip(indices, frames, strict=True))
    xyz, rot = seen.history_xyz[0].numpy(), seen.history_rot[0].numpy()
    return Observation(number, stamps[-1], tuple(cameras), xyz, rot, seen.navigation[0])


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"engine": "fake", "fake.latency_s": 0.0}, 25),
        (RECORDED_NETWORK | {"engine": "plain", "flow_steps": 4}, 3),
        (RECORDED_NETWORK | {"engine": "streaming", "stream_mode": "kv", "flow_schedule": "8:0,1,2,7"}, 4),
    ],
    ids=["fake", "plain", "streaming"],
)
def test_a_drive_in_lock_step_equals_one_in_process(
    bench: Bench, tmp_path, one_camera, four_cameras, one_thread, values, steps
):
    """The pictures travel as PNG, so both see the same; scene 38 has a navigation text."""
    rig_file = one_camera if values["engine"] == "fake" else four_cameras
    rig = load_rig(rig_file)
    parameters = {key.replace(".", "__"): value for key, value in values.items()}
    with driving_node(bench, tmp_path, rig_file, **parameters) as node:
        with world(bench, tmp_path, rig=str(rig_file), file_format="png") as found:
            driven, seen = begin(found, 38), []
            for _ in range(steps):
                driven.steps(1)
                seen.append((driven.drive.record, driven.pose))
        assert node.stop() == 0
    log = driven.drive.log
    assert (log.answered, log.unanswered, log.other_inputs, log.following) == (steps, {}, 0, steps)

    engine = choose_engine(parameters_from(values), rig).make()
    engine.load()
    engine.warm_up()
    engine.reset("activated")
    loop = ClosedLoop(sample_scenes(scene_keys("test", [38])), found.frames)
    for number, (record, pose) in enumerate(seen, 1):
        prediction = engine.step(observation(loop, [camera.index for camera in rig.cameras], number))
        sample = prediction.trajectory
        if values["engine"] != "fake":  # whose text counts windows
            assert record["reasoning"] == sample.reasoning
        # The record is rounded to a tenth of a millimetre.
        np.testing.assert_allclose(record["trajectory"]["xyz_m"], sample.xyz, atol=1e-3)
        loop.publish(*(torch.from_numpy(a)[None] for a in (sample.xyz, sample.yaw, sample.speed)))
        loop.step()
        s = loop.state
        assert pose == pytest.approx((float(s.x), float(s.y), float(s.yaw), float(s.speed)), abs=1e-4), number
    assert any(record["nav_text"] for record, _ in seen)
    for through_ros, in_process in zip(driven.loop.tally.scores(), loop.tally.scores(), strict=True):
        assert through_ros.tolist() == pytest.approx(in_process.tolist(), abs=1e-4)
    engine.close()


def test_without_trajectories_the_vehicle_brakes_to_a_standstill_and_goes_on_with_the_next(
    bench: Bench, tmp_path, one_camera
):
    with (
        driving_node(bench, tmp_path, one_camera, engine="fake", fake__latency_s=0.0, fake__fault="short") as node,
        world(bench, tmp_path, rig=str(one_camera)) as found,
    ):
        driven = begin(found, SLOW_SCENE)
        speed = driven.pose[3]
        steps = int(speed / 2.0 / 0.1) + 3
        driven.steps(steps)
        assert driven.pose[3] == 0.0
        log = driven.drive.log
        assert log.unanswered == {"withheld: reasoning: the reasoning text has no end": steps}
        assert (log.answered, log.following) == (0, 0)
        # At a standstill all pictures are equal; the node takes them for those of a camera that works.
        assert node.set_parameters(fake__fault="none") == []
        driven.steps(6)
        assert (log.answered, log.following) == (6, 6)
        scores = driven.loop.tally.scores()
        assert float(scores.distance_m) == pytest.approx(speed**2 / 4, abs=0.5)
        assert not bool(scores.at_fault_collision)


def test_in_real_time_the_latency_is_driven(bench: Bench, tmp_path, one_camera):
    latency_s = 0.25
    with (
        driving_node(bench, tmp_path, one_camera, engine="fake", fake__latency_s=latency_s),
        world(bench, tmp_path, rig=str(one_camera), mode=real_time()) as found,
    ):
        driven = begin(found, SLOW_SCENE)
        driven.steps(30)
        log = driven.drive.log
        assert log.answered >= 20
        # The world may be late itself, which stretches time; but never is a trajectory younger than its latency.
        assert min(log.age_ms) >= 1e3 * latency_s - 50.0
        assert log.following >= log.answered
        assert driven.pose[3] > 5.0
        assert log.other_inputs == 0


def test_a_node_with_another_clock_or_of_another_version_is_refused(bench: Bench, tmp_path, one_camera):
    with (
        driving_node(bench, tmp_path, one_camera, engine="fake", use_sim_time=False) as node,
        world(bench, tmp_path, rig=str(one_camera)) as found,
    ):
        with pytest.raises(DriverError, match=r"must have the clock of /clock, 1001.500 s \(use_sim_time\), found \d+"):
            found.link.reset(1_001_500_000_000, timeout_s=1.0)
        record = bench.node.create_publisher(String, f"{node.full_name}/output/record", 1)
        wait_until(record.get_subscription_count, 5.0, "the world")
        record.publish(String(data='{"time": 3}'))
        with pytest.raises(DriverError, match="what /flashdrive_node publishes cannot be read: KeyError"):
            wait_until(lambda: found.link.newest(0).plan, 5.0, "the refusal")


def test_a_node_that_is_not_there_or_not_configured_is_waited_for_no_longer_than_asked(
    bench: Bench, tmp_path, one_camera
):
    options = {"rig": str(one_camera), "ready_timeout_s": 1.0}
    with (
        pytest.raises(DriverError, match="was not ready within 1 s: it has published nothing on /diagnostics"),
        world(bench, tmp_path, **options),
    ):
        pass
    with driving_node(bench, tmp_path, one_camera, engine="fake", auto_activate=False) as node:
        wait_until(lambda: bench.node.get_publishers_info_by_topic("/diagnostics"), 20.0, "the node")
        with (
            pytest.raises(DriverError, match=r"was not ready within 1 s: it last said 'unconfigured'"),
            world(bench, tmp_path, **options),
        ):
            pass
        assert node.running()
