"""Images read from their serialised form, against rclpy's own serialisation."""

from __future__ import annotations

import array
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from flashdrive_node.ros import messages
from flashdrive_node.ros.serialized import SerializedError, compressed_image, raw_image

texts = st.text(max_size=12).filter(lambda t: "\0" not in t)
stamps = st.integers(0, (2**31 - 1) * 10**9)


def an_image(stamp_ns=5_000_000_007, frame_id="camera", encoding="rgb8", data=b"\1\2\3\4\5\6", bigendian=0) -> Image:
    message = Image(height=1, width=2, encoding=encoding, is_bigendian=bigendian, step=6, data=array.array("B", data))
    message.header.stamp, message.header.frame_id = messages.stamp_message(stamp_ns), frame_id
    return message


def a_file(stamp_ns=5_000_000_007, frame_id="camera", encoding="jpeg", data=b"\xff\xd8\1") -> CompressedImage:
    message = CompressedImage(format=encoding, data=array.array("B", data))
    message.header.stamp, message.header.frame_id = messages.stamp_message(stamp_ns), frame_id
    return message


@given(stamps, texts, texts, st.binary(max_size=50), st.integers(0, 1))
def test_raw_images_are_read_as_rclpy_wrote_them(stamp_ns, frame_id, encoding, data, bigendian):
    serialized = serialize_message(an_image(stamp_ns, frame_id, encoding, data, bigendian))
    image = raw_image(serialized)
    assert (image.stamp_ns, image.encoding, bytes(image.data)) == (stamp_ns, encoding, data)
    assert (image.height, image.width, image.step, image.is_bigendian) == (1, 2, 6, bool(bigendian))
    assert not image.compressed


@given(stamps, texts, texts, st.binary(max_size=50))
def test_compressed_images_are_read_as_rclpy_wrote_them(stamp_ns, frame_id, encoding, data):
    image = compressed_image(serialize_message(a_file(stamp_ns, frame_id, encoding, data)))
    assert (image.stamp_ns, image.encoding, bytes(image.data)) == (stamp_ns, encoding, data)
    assert image.compressed


def test_pixels_are_not_copied():
    serialized = serialize_message(an_image())
    assert raw_image(serialized).data.obj is serialized


def test_every_cut_of_a_message_is_an_error_that_says_so():
    for parse, message in ((raw_image, an_image()), (compressed_image, a_file())):
        whole = serialize_message(message)
        # What stands behind the data is padding.
        for length in range(whole.rindex(bytes(message.data)) + len(message.data)):
            with pytest.raises(SerializedError, match=r"CDR|cut|announced"):
                parse(whole[:length])


@given(st.binary(max_size=80))
def test_noise_is_an_image_or_an_error(noise):
    for parse in (raw_image, compressed_image):
        try:
            image = parse(b"\0\1\0\0" + noise)
        except SerializedError:
            continue
        assert len(image.data) <= len(noise)


def test_big_endian_messages():
    text = struct.pack(">I4s", 4, b"png\0")
    head = b"\0\0\0\0" + struct.pack(">iII", 3, 4, 1) + b"\0" + b"\0" * 3 + text
    image = compressed_image(head + struct.pack(">I2s", 2, b"ab"))
    assert (image.stamp_ns, image.encoding, bytes(image.data)) == (3_000_000_004, "png", b"ab")


def test_another_representation_is_refused():
    with pytest.raises(SerializedError, match="plain CDR message is required"):
        compressed_image(b"\0\7\0\0" + bytes(40))
