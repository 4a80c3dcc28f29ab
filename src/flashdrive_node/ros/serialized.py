"""Images straight from their serialised form, so that megabytes of pixels are never copied into Python objects.

rclpy turns the data of an image into a new Python array, which costs more than everything else the node does with it;
a raw subscription hands over the message as DDS carried it (plain CDR), and only the few fields before the data are
read here. The image keeps a view of the message's bytes.
"""

from __future__ import annotations

import struct
import time

from flashdrive_node.runtime.observation import RawImage


class SerializedError(ValueError):
    """A serialised message that is not what its type says."""


class _Reader:
    """Reads CDR fields in order; alignment counts from the end of the 4-byte encapsulation header."""

    def __init__(self, message: bytes):
        if len(message) < 4 or message[0] != 0 or message[1] not in (0, 1):
            raise SerializedError(
                f"a plain CDR message is required, found {len(message)} bytes from {message[:4].hex()}"
            )
        self.message = memoryview(message)
        self.order = "<" if message[1] == 1 else ">"
        self.offset = 4

    def number(self, kind: str, size: int) -> int:
        self.offset += -(self.offset - 4) % size
        value: int = struct.unpack_from(self.order + kind, self.message, self.offset)[0]
        self.offset += size
        return value

    def take(self, length: int) -> memoryview:
        end = self.offset + length
        if end > len(self.message):
            raise SerializedError(f"{length} bytes are announced, {len(self.message) - self.offset} are there")
        part = self.message[self.offset : end]
        self.offset = end
        return part

    def text(self) -> str:
        return bytes(self.take(self.number("I", 4))).rstrip(b"\0").decode("utf-8", errors="replace")

    def stamp_ns(self) -> int:
        seconds = self.number("i", 4)
        return seconds * 1_000_000_000 + self.number("I", 4)


def compressed_image(message: bytes) -> RawImage:
    """A serialised sensor_msgs/CompressedImage.

    Raises:
        SerializedError: The message is cut or no plain CDR.
    """
    received_ns = time.monotonic_ns()
    try:
        reader = _Reader(message)
        stamp_ns, _frame_id, encoding = reader.stamp_ns(), reader.text(), reader.text()
        data = reader.take(reader.number("I", 4))
    except struct.error as error:
        raise SerializedError(f"the message is cut after {len(message)} bytes") from error
    return RawImage(stamp_ns, received_ns, encoding, 0, 0, 0, False, data)


def raw_image(message: bytes) -> RawImage:
    """A serialised sensor_msgs/Image.

    Raises:
        SerializedError: The message is cut or no plain CDR.
    """
    received_ns = time.monotonic_ns()
    try:
        reader = _Reader(message)
        stamp_ns, _frame_id = reader.stamp_ns(), reader.text()
        height, width = reader.number("I", 4), reader.number("I", 4)
        encoding, is_bigendian = reader.text(), reader.number("B", 1)
        step = reader.number("I", 4)
        data = reader.take(reader.number("I", 4))
    except struct.error as error:
        raise SerializedError(f"the message is cut after {len(message)} bytes") from error
    return RawImage(stamp_ns, received_ns, encoding, width, height, step, bool(is_bigendian), data)
