"""Measures what the node costs around the engine: four cameras in one burst, from another process, over real DDS."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import rclpy
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import String

from flashdrive_node.bundled import bundled_drive
from flashdrive_node.evaluation.metrics import Percentiles
from flashdrive_node.ros.messages import odometry_message, stamp_message
from flashdrive_node.ros.session import Session, SessionOptions
from flashdrive_node.ros.topics import NODE_NAME
from flashdrive_node.runtime.bag import messages, open_bag, raw_image
from flashdrive_node.runtime.decode import decode_image
from flashdrive_node.runtime.rig import load_rig

_RIG = "sample"
_ODOMETRY_HZ = 50.0
#: Pictures per camera that are taken from the bundled drive, half a second apart, and then sent in turn.
_PICTURES, _EVERY = 6, 5
#: The vehicle drives straight on, m/s.
_SPEED = 10.0
_WARM_UP_S = 3.0
#: Standard deviation of the sensor noise in grey levels: rendered pictures alone would be small files, quickly decoded.
_NOISE = 3.0


@dataclass(frozen=True)
class BurstOptions:
    """What the cameras send."""

    seconds: float = 20.0
    rate_hz: float = 10.0
    width: int = 1920
    height: int = 1080
    engine_latency_s: float = 0.03


@dataclass(frozen=True)
class Overhead:
    """The figures of one measurement."""

    options: BurstOptions
    #: Windows that the cameras allow at the node's default period of 0.1 s, and windows published.
    possible: int
    windows: int
    image_kib: float
    #: Last image of the window received -> engine started; engine ended -> trajectory published.
    input_to_engine_ms: Percentiles | None
    engine_to_published_ms: Percentiles | None
    #: Time for decoding within the first figure.
    decode_ms: Percentiles | None
    node_cpu_percent: float
    #: Frames received by the node as a share of those sent, all cameras.
    received_share: float
    conditions: str

    def to_json(self) -> str:
        """Everything as indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def table(self) -> list[str]:
        """A table for a terminal or a README."""
        o = self.options
        lines = [
            f"{o.width}x{o.height} JPEG ({self.image_kib:.0f} KiB) x 4 cameras in one burst, {o.rate_hz:g} Hz, "
            f"{o.seconds:g} s, fake engine of {o.engine_latency_s * 1e3:.0f} ms",
            f"{self.conditions}",
            "",
            "| from -> to | p50 [ms] | p95 [ms] | max [ms] |",
            "|---|---|---|---|",
        ]
        for label, values in (
            ("newest image received -> engine start", self.input_to_engine_ms),
            ("of which decoding", self.decode_ms),
            ("engine end -> trajectory published", self.engine_to_published_ms),
        ):
            if values is not None:
                lines.append(f"| {label} | {values.p50:.1f} | {values.p95:.1f} | {values.max:.1f} |")
        lines += [
            "",
            f"windows published {self.windows} of {self.possible}; images received "
            f"{100 * self.received_share:.1f} %; CPU of the node {self.node_cpu_percent:.0f} % of one core",
        ]
        return lines


def measure(options: BurstOptions, folder: Path) -> Overhead:
    """Start the node with the fake engine and a process that plays the cameras, and read the node's own times.

    Args:
        options: What the cameras send.
        folder: For logs and the rig file.

    Raises:
        SessionError: The node could not be started.
    """
    rig_file, load = _rig_at_rate(folder, options.rate_hz), os.getloadavg()[0]
    session = SessionOptions(
        rig=str(rig_file),
        folder=folder,
        parameters={"engine": "fake", "fake.latency_s": options.engine_latency_s},
        use_sim_time=False,
    )
    records: list[dict[str, float]] = []

    def on_record(message: String) -> None:
        records.append(json.loads(message.data)["timings_ms"])

    with Session(session) as running:
        running.control.create_subscription(String, f"/{NODE_NAME}/output/record", on_record, QoSProfile(depth=100))
        running.bring_up(60.0)
        total_s = options.seconds + _WARM_UP_S
        arguments = [str(rig_file), str(options.rate_hz), str(options.width), str(options.height), str(total_s)]
        cameras = running.spawn("flashdrive_node.ros.overhead", arguments, sends_images=True)
        assert cameras.stdout is not None
        # The first line comes once the pictures are drawn and the node listens.
        image_kib = float(cameras.stdout.readline() or "nan")
        running.spin(_WARM_UP_S)
        records.clear()
        cpu_start, start = _cpu_seconds(running.node.pid), time.monotonic()
        while cameras.poll() is None:
            running.spin(0.1)
        cpu, wall = _cpu_seconds(running.node.pid) - cpu_start, time.monotonic() - start
        measured = list(records)
        running.wait_for_diagnostics(2, 3.0)
        sent = int(cameras.stdout.readline() or 0)
        received = sum(
            int(item.value)
            for name, status in running.diagnostics.items()
            if name.startswith("camera ")
            for item in status.values
            if item.key == "received"
        )
    return Overhead(
        options=options,
        possible=round(options.seconds * min(options.rate_hz, 10.0)),
        windows=len(measured),
        image_kib=image_kib,
        input_to_engine_ms=_of(measured, "input_to_engine"),
        engine_to_published_ms=_of(measured, "publish"),
        decode_ms=_of(measured, "decode"),
        node_cpu_percent=100.0 * cpu / wall,
        received_share=received / max(sent, 1),
        conditions=f"{_cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"OpenCV {cv2.__version__}, Fast DDS over shared memory, load average before the run {load:.1f}",
    )


def _of(records: list[dict[str, float]], stage: str) -> Percentiles | None:
    values = [record[stage] for record in records if stage in record]
    return Percentiles.of(values) if values else None


def _rig_at_rate(folder: Path, rate_hz: float) -> Path:
    """The sample rig with another camera rate, as a file."""
    rig = load_rig(_RIG)
    lines = ["name: benchmark", f"odometry_topic: {rig.odometry_topic}", f"base_frame: {rig.base_frame}", "cameras:"]
    for camera in rig.cameras:
        lines.append(f"  - {{name: {camera.name}, index: {camera.index}, topic: {camera.topic}, rate_hz: {rate_hz}}}")
    path = folder / "rig.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _play_cameras(rig_file: Path, rate_hz: float, width: int, height: int, seconds: float) -> int:
    """The cameras' process: prepares a few pictures, waits for the node, then sends bursts and odometry."""
    rig = load_rig(rig_file)
    noise = np.random.default_rng(0).normal(0.0, _NOISE, (height, width, 3))
    pictures: dict[int, list[array[int]]] = {}
    for camera in rig.cameras:
        pictures[camera.index] = [array("B", _jpeg(view, noise)) for view in _views(camera.topic, width, height)]
    sizes = [len(data) for views in pictures.values() for data in views]
    rclpy.init(args=[])
    node = Node("flashdrive_cameras", enable_rosout=False, start_parameter_services=False)
    images = {c.index: node.create_publisher(CompressedImage, c.topic, QoSProfile(depth=5)) for c in rig.cameras}
    odometry = node.create_publisher(Odometry, rig.odometry_topic, QoSProfile(depth=50))
    while any(p.get_subscription_count() == 0 for p in (odometry, *images.values())):
        time.sleep(0.05)
    print(sum(sizes) / len(sizes) / 1024, flush=True)
    start, start_ns = time.monotonic(), time.time_ns()
    sent = bursts = samples = 0
    while (now := time.monotonic() - start) < seconds:
        if now >= samples / _ODOMETRY_HZ:
            odometry.publish(_odometry(samples / _ODOMETRY_HZ, start_ns, rig.base_frame))
            samples += 1
        elif now >= bursts / rate_hz:
            stamp = stamp_message(start_ns + round(bursts / rate_hz * 1e9))
            for index, publisher in images.items():
                message = CompressedImage(format="jpeg")
                message.header.stamp = stamp
                message.data = pictures[index][bursts % _PICTURES]
                publisher.publish(message)
                sent += 1
            bursts += 1
        else:
            time.sleep(max(0.0, min(samples / _ODOMETRY_HZ, bursts / rate_hz) - now))
    print(sent, flush=True)
    node.destroy_node()
    rclpy.try_shutdown()
    return 0


def _views(topic: str, width: int, height: int) -> Iterator[NDArray[np.uint8]]:
    """Pictures of the bundled drive, enlarged, RGB uint8 [height, width, 3]."""
    with open_bag(bundled_drive()) as reader:
        (connection,) = (c for c in reader.connections if c.topic == topic)
        for _, _, raw in islice(messages(reader, [connection]), 0, _PICTURES * _EVERY, _EVERY):
            image = decode_image(raw_image(reader.deserialize(raw, connection.msgtype), connection.msgtype))
            yield np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def _jpeg(picture: NDArray[np.uint8], noise: NDArray[np.float64]) -> bytes:
    noisy = np.clip(picture[..., ::-1] + noise, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def _odometry(time_s: float, start_ns: int, base_frame: str) -> Odometry:
    stamp_ns = start_ns + round(time_s * 1e9)
    return odometry_message(stamp_ns, "odom", base_frame, (_SPEED * time_s, 0.0, 0.0), _SPEED, 0.0)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the cameras' process."""
    parser = argparse.ArgumentParser(prog="flashdrive_cameras")
    parser.add_argument("rig", type=Path)
    parser.add_argument("rate_hz", type=float)
    parser.add_argument("width", type=int)
    parser.add_argument("height", type=int)
    parser.add_argument("seconds", type=float)
    args = parser.parse_args(argv)
    return _play_cameras(args.rig, args.rate_hz, args.width, args.height, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
