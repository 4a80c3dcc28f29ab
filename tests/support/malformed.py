"""Random nonsense on every input of the node, reproducible by seed."""

from __future__ import annotations

import array
import math
import random
import time
from collections.abc import Callable

from nav_msgs.msg import Odometry
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from support.node_process import Bench
from support.painted_frames import paint_jpeg
from support.vehicle import to_time

NUMBERS = (0.0, 1.0, -1.0, 1e-320, 1e30, -1e300, math.nan, math.inf, -math.inf)
ENCODINGS = ("rgb8", "bgr8", "mono8", "mono16", "nv12", "yuv422", "bayer_rggb8", "32FC1", "jpeg", "", "ÿ\n", "x" * 3000)
FORMATS = ("jpeg", "png", "", "rgb8; jpeg compressed bgr8", "h264", "compressedDepth", "\u202e" * 40)
FRAMES = ("odom", "", "map", "base_link", "/", "\n" * 9)
TEXTS = ("", " ", "<|im_end|>", "<|traj_future_start|>" * 50, "\x00\x01", "Turn left" * 4000, "\U0001f6a7\ufffd", "{}")


def _stamp(chance: random.Random, now_ns: int) -> int:
    """Near now, in the past, in the future, zero, or the last one that the message can hold."""
    near = now_ns + round(chance.uniform(-0.3, 0.05) * 1e9)
    return chance.choice([near, near, now_ns - 900_000_000, now_ns + 10**15, 0, (2**31 - 1) * 10**9])


def random_compressed(chance: random.Random, now_ns: int) -> CompressedImage:
    """An image file that is cut, scrambled, of another size, empty, or noise."""
    data = bytearray(paint_jpeg(chance.randrange(7), chance.randrange(1000), chance.choice([64, 160, 500]), 96))
    kind = chance.randrange(5)
    if kind == 0:
        data = data[: chance.randrange(len(data))]
    elif kind == 1:
        for _ in range(20):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif kind == 2:
        data = bytearray(chance.randbytes(chance.randrange(2000)))
    elif kind == 3:
        # The file's header promises 65,500 x 65,500 pixels.
        start = data.index(b"\xff\xc0")
        data[start + 5 : start + 9] = b"\xff\xdc\xff\xdc"
    message = CompressedImage(format=chance.choice(FORMATS), data=array.array("B", bytes(data)))
    message.header.stamp = to_time(_stamp(chance, now_ns))
    return message


def random_image(chance: random.Random, now_ns: int) -> Image:
    """Rows whose size, step, encoding and length do not go together."""
    sides = (0, 1, 2, 3, 96, 160, 65_536, 2**32 - 1)
    message = Image(encoding=chance.choice(ENCODINGS), is_bigendian=chance.randrange(256))
    message.width, message.height = chance.choice(sides), chance.choice(sides)
    message.step = chance.choice([0, 1, message.width, min(3 * message.width, 2**32 - 1), 2**32 - 1])
    message.data = array.array("B", chance.randbytes(chance.choice([0, 1, 3, 1000, 160 * 96 * 3])))
    message.header.stamp = to_time(_stamp(chance, now_ns))
    return message


def random_odometry(chance: random.Random, now_ns: int) -> Odometry:
    """Poses and twists that no vehicle has, each at least once not a number or far away."""
    message = Odometry(child_frame_id=chance.choice(FRAMES))
    message.header.frame_id = chance.choice(FRAMES)
    message.header.stamp = to_time(_stamp(chance, now_ns))
    pose, twist = message.pose.pose, message.twist.twist
    for vector in (pose.position, twist.linear, twist.angular):
        vector.x, vector.y, vector.z = (chance.choice(NUMBERS) for _ in range(3))
    turn = pose.orientation
    turn.x, turn.y, turn.z, turn.w = (chance.choice(NUMBERS) for _ in range(4))
    return message


def random_text(chance: random.Random, now_ns: int) -> String:
    """Texts that are no instruction."""
    return String(data=chance.choice(TEXTS))


def _broken(chance: random.Random, data: bytes) -> bytes:
    """A serialised message whose bytes were cut or changed, so that its lengths are wrong."""
    changed = bytearray(data)
    if chance.random() < 0.5:
        return bytes(changed[: chance.randrange(4, len(changed))])
    for _ in range(8):
        changed[chance.randrange(4, len(changed))] = chance.randrange(256)
    return bytes(changed)


def publish_malformed(
    bench: Bench, topics: dict[str, type], now_ns: Callable[[], int], count: int = 1000, seed: int = 0
) -> int:
    """Publish ``count`` malformed messages, a fifth of them not even well serialised; how many were sent.

    Args:
        bench: Participant that publishes.
        topics: Message type by topic name.
        now_ns: Clock that the stamps are around.
        count: Messages in all.
        seed: Seed of the nonsense.
    """
    makers = {CompressedImage: random_compressed, Image: random_image, Odometry: random_odometry, String: random_text}
    chance = random.Random(seed)
    publishers = {topic: bench.node.create_publisher(kind, topic, 10) for topic, kind in topics.items()}
    deadline_s = time.monotonic() + 5.0
    while any(p.get_subscription_count() == 0 for p in publishers.values()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"nobody listens on one of {sorted(topics)}")
        time.sleep(0.01)
    for _ in range(count):
        topic = chance.choice(sorted(topics))
        message = makers[topics[topic]](chance, now_ns())
        publishers[topic].publish(_broken(chance, serialize_message(message)) if chance.random() < 0.2 else message)
        # Faster than any sensor, slow enough that the queue of ten takes most of them.
        time.sleep(0.0015)
    for publisher in publishers.values():
        bench.node.destroy_publisher(publisher)
    return count
