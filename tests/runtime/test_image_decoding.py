"""Every encoding against a picture whose colours are known, and every malformed input by its message."""

from __future__ import annotations

import gc
import struct
import threading
import weakref
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashdrive_node.runtime.decode import ENCODINGS, DecodeError, compressed_size, decode_image, signature
from flashdrive_node.runtime.decode_pool import DecodePool
from flashdrive_node.runtime.frames import Frame
from flashdrive_node.runtime.observation import RawImage
from flashdrive_node.runtime.rig import CameraSpec, Rig

Pixels = NDArray[np.uint8]
HEIGHT, WIDTH = 24, 32


def picture() -> Pixels:
    """Four flat colours, so that subsampled chroma and Bayer patterns are exact away from the borders."""
    out = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    out[:12, :16], out[:12, 16:] = (200, 40, 60), (30, 180, 90)
    out[12:, :16], out[12:, 16:] = (50, 70, 220), (128, 128, 128)
    return out


def yuv(rgb: Pixels) -> tuple[Pixels, Pixels, Pixels]:
    """BT.601 in studio range, as cameras send it."""
    r, g, b = np.moveaxis(rgb.astype(np.float64), -1, 0)
    y = 16 + 0.257 * r + 0.504 * g + 0.098 * b
    u = 128 - 0.148 * r - 0.291 * g + 0.439 * b
    v = 128 + 0.439 * r - 0.368 * g - 0.071 * b
    return tuple(np.clip(np.rint(plane), 0, 255).astype(np.uint8) for plane in (y, u, v))  # type: ignore[return-value]


def packed_422(rgb: Pixels, order: str) -> Pixels:
    y, u, v = yuv(rgb)
    quads = {"u": u[:, ::2], "v": v[:, ::2], "0": y[:, ::2], "1": y[:, 1::2]}
    return np.stack([quads[c] for c in order], axis=2).reshape(HEIGHT, -1)


def semi_planar(rgb: Pixels, first: int) -> Pixels:
    y, u, v = yuv(rgb)
    chroma = [u[::2, ::2], v[::2, ::2]]
    return np.vstack([y, np.stack([chroma[first], chroma[1 - first]], axis=2).reshape(HEIGHT // 2, -1)])


def bayer(rgb: Pixels, pattern: str) -> Pixels:
    out = np.zeros((HEIGHT, WIDTH), np.uint8)
    for k, colour in enumerate(pattern):
        out[k // 2 :: 2, k % 2 :: 2] = rgb[k // 2 :: 2, k % 2 :: 2, "rgb".index(colour)]
    return out


def flat(pixels: Pixels) -> Pixels:
    return pixels.reshape(pixels.shape[0], -1)


def with_alpha(rgb: Pixels) -> Pixels:
    return np.dstack([rgb, np.full((HEIGHT, WIDTH), 7, np.uint8)])


def gray(rgb: Pixels) -> Pixels:
    return rgb[:, :, 0]


#: Encoding -> rows of the picture.
ROWS: dict[str, Callable[[Pixels], Pixels]] = {
    "rgb8": flat,
    "bgr8": lambda p: flat(p[:, :, ::-1]),
    "rgba8": lambda p: flat(with_alpha(p)),
    "bgra8": lambda p: flat(with_alpha(p)[:, :, [2, 1, 0, 3]]),
    "mono8": gray,
    "mono16": lambda p: flat(np.dstack([np.full((HEIGHT, WIDTH), 3, np.uint8), gray(p)])),
    "yuv422": lambda p: packed_422(p, "u0v1"),
    "uyvy": lambda p: packed_422(p, "u0v1"),
    "yuv422_yuy2": lambda p: packed_422(p, "0u1v"),
    "yuyv": lambda p: packed_422(p, "0u1v"),
    "nv12": lambda p: semi_planar(p, 0),
    "nv21": lambda p: semi_planar(p, 1),
    **{
        f"bayer_{pattern}8": lambda p, pattern=pattern: bayer(p, pattern)
        for pattern in ("rggb", "bggr", "gbrg", "grbg")
    },
}


def raw(encoding: str, rows: Pixels, padding: int = 0, big_endian: bool = False, cut_last: bool = False) -> RawImage:
    step = rows.shape[1] + padding
    data = np.pad(rows, ((0, 0), (0, padding)), constant_values=99).tobytes()
    return RawImage(0, 0, encoding, WIDTH, HEIGHT, step, big_endian, data[: -padding or None] if cut_last else data)


def expected(encoding: str) -> Pixels:
    return np.repeat(gray(picture())[:, :, None], 3, axis=2) if encoding.startswith("mono") else picture()


def test_every_encoding_is_tested() -> None:
    assert set(ROWS) == set(ENCODINGS)


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("encoding", ROWS)
def test_raw_encodings(encoding: str, padding: int) -> None:
    rows = ROWS[encoding](picture())
    for cut_last in (False, True):
        found = decode_image(raw(encoding, rows, padding, cut_last=cut_last))
        assert found.shape == (HEIGHT, WIDTH, 3)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        difference = np.abs(found.astype(int) - expected(encoding).astype(int))
        if "yuv" in encoding or "uy" in encoding or "nv" in encoding:
            assert difference.max() <= 4
        elif "bayer" in encoding:
            for top in (2, 14):
                for left in (2, 18):
                    assert difference[top : top + 8, left : left + 12].max() == 0
        else:
            assert difference.max() == 0


def test_mono16_of_both_byte_orders() -> None:
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 80
    for dtype, big in (("<u2", False), (">u2", True)):
        rows = np.frombuffer(values.astype(dtype).tobytes(), np.uint8).reshape(HEIGHT, -1)
        found = decode_image(raw("mono16", rows, padding=3, big_endian=big))
        np.testing.assert_array_equal(found[:, :, 1], values >> 8)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_compressed(kind: str) -> None:
    rgb = cv2.resize(picture(), (320, 240), interpolation=cv2.INTER_NEAREST)
    data = cv2.imencode(f".{kind}", rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    assert compressed_size(np.frombuffer(data, np.uint8)) == (320, 240)
    found = decode_image(compressed(data))
    assert found.shape == (240, 320, 3)
    assert np.abs(found[20:100, 20:140].astype(int) - [200, 40, 60]).max() <= (4 if kind == "jpeg" else 0)
    # Some cameras pad their messages behind the end of the file.
    padded = decode_image(compressed(data + bytes(100)))
    np.testing.assert_array_equal(padded, found)


def test_gray_jpeg_becomes_rgb() -> None:
    data = cv2.imencode(".jpg", gray(picture()))[1].tobytes()
    assert decode_image(compressed(data)).shape == (HEIGHT, WIDTH, 3)


def test_orientation_tag_does_not_turn_the_picture() -> None:
    data = cv2.imencode(".jpg", picture())[1].tobytes()
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    tiff = b"MM\x00\x2a" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 0)
    exif = b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\x00\x00" + tiff
    assert decode_image(compressed(data[:2] + exif + data[2:])).shape == (HEIGHT, WIDTH, 3)


def compressed(data: bytes) -> RawImage:
    return RawImage(0, 0, "jpeg", 0, 0, 0, False, data)


JPEG = cv2.imencode(".jpg", np.full((48, 64, 3), 90, np.uint8))[1].tobytes()
PNG = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))[1].tobytes()
RGB = np.zeros((HEIGHT, WIDTH * 3), np.uint8)
BOMB = PNG[:16] + struct.pack(">II", 60000, 60000) + PNG[24:]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (compressed(b""), "must be JPEG or PNG, found 0 bytes that start with nothing"),
        (compressed(b"GIF89a" * 9), "must be JPEG or PNG, found 54 bytes that start with 47494638"),
        (compressed(JPEG[:200]), "JPEG of 200 bytes is cut off: it must end with an end-of-image marker"),
        (compressed(JPEG[:8]), "JPEG of 8 bytes has no start of frame"),
        (compressed(JPEG[:2] + b"\x00" * 50), "JPEG must have a marker at byte 2, found 0x0"),
        (compressed(JPEG[:20] + b"\xff\xd9"), "JPEG"),
        (compressed(PNG[:20]), "PNG must start with an IHDR chunk, found 20 bytes"),
        (compressed(PNG[:60]), "corrupt"),
        (compressed(BOMB), "at most 16777216 pixels, found 60000 x 60000"),
        (RawImage(0, 0, "rgb8", 0, 0, 0, False, b""), "at least one pixel, found 0 x 0"),
        (
            RawImage(0, 0, "rgb8", WIDTH, HEIGHT, WIDTH * 2, False, RGB.tobytes()),
            "at least 32 x 3 = 96 bytes, found 64",
        ),
        (RawImage(0, 0, "rgb8", WIDTH, HEIGHT, 96, False, RGB.tobytes()[:-1]), "96 x 24 = 2304 bytes, found 2303"),
        (RawImage(0, 0, "rgb8", WIDTH, HEIGHT, 96, False, RGB.tobytes() + b"1"), "96 x 24 = 2304 bytes, found 2305"),
        (RawImage(0, 0, "rgb8", 2**31, 2**31, 96, False, b""), "at most 16777216 pixels"),
        (RawImage(0, 0, "32FC1", WIDTH, HEIGHT, 128, False, b""), "encoding must be one of rgb8, .*found '32FC1'"),
        (RawImage(0, 0, "yuyv", 31, HEIGHT, 62, False, bytes(62 * 24)), "even size, found 31 x 24"),
        (RawImage(0, 0, "nv12", 32, 23, 32, False, bytes(32 * 36)), "even size, found 32 x 23"),
    ],
)
def test_malformed_input_is_named(image: RawImage, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        decode_image(image)


def test_size_other_than_the_rig_says() -> None:
    assert decode_image(compressed(JPEG), width=64, height=48).shape == (48, 64, 3)
    with pytest.raises(DecodeError, match="must be 1920 x 1080 pixels, found 64 x 48"):
        decode_image(compressed(JPEG), width=1920, height=1080)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from([JPEG, PNG]))
def test_damaged_files_give_a_picture_or_a_decode_error(data: st.DataObject, kind: bytes) -> None:
    damaged = bytearray(kind)
    for at in data.draw(st.lists(st.integers(0, len(kind) - 1), min_size=1, max_size=8)):
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(kind)))
    try:
        found = decode_image(compressed(bytes(damaged[:cut])), max_pixels=10**6)
    except DecodeError:
        return
    assert found.ndim == 3


@settings(max_examples=150, deadline=None)
@given(
    encoding=st.sampled_from([*ENCODINGS, "", "jpeg", "rgb16"]),
    width=st.integers(0, 70),
    height=st.integers(0, 50),
    step=st.integers(0, 300),
    data=st.binary(max_size=3000),
)
def test_random_headers_never_read_out_of_bounds(
    encoding: str, width: int, height: int, step: int, data: bytes
) -> None:
    try:
        found = decode_image(RawImage(0, 0, encoding, width, height, step, False, data))
    except DecodeError:
        return
    assert found.shape == (height, width, 3)


def test_unpadded_rgb8_is_not_copied() -> None:
    data = RGB.tobytes()
    assert np.shares_memory(
        decode_image(RawImage(0, 0, "rgb8", WIDTH, HEIGHT, 96, False, data)), np.frombuffer(data, np.uint8)
    )


def test_signature_is_of_all_bytes() -> None:
    assert signature(compressed(JPEG)) == zlib.crc32(JPEG)
    assert signature(compressed(JPEG)) != signature(compressed(JPEG[:-1] + b"\x00"))


def test_pool_decodes_each_frame_once_and_reports_errors() -> None:
    rig = Rig("test", (CameraSpec("front", 1, "/front", "compressed", 10.0),), "/odometry", None)
    pool = DecodePool(rig, threads=2)
    frames = [Frame(1, k, 0, compressed(JPEG if k % 4 else b"broken")) for k in range(20)]
    done: list[int] = []
    for _ in range(3):
        pool.when_decoded(frames, lambda: done.append(sum(f.pixels is not None or f.error is not None for f in frames)))
    decoded = threading.Event()
    pool.when_decoded(frames, decoded.set)
    assert decoded.wait(10)
    pool.close()
    assert done == [20, 20, 20]
    assert pool.decoded == 20
    assert all(frame.raw is None for frame in frames)
    assert [frame.error is not None for frame in frames] == [k % 4 == 0 for k in range(20)]


def test_pool_skips_frames_that_were_removed() -> None:
    rig = Rig("test", (CameraSpec("front", 1, "/front", "compressed", 10.0),), "/odometry", None)
    pool = DecodePool(rig, threads=1)
    frame = Frame(1, 0, 0, compressed(JPEG), evicted=True)
    decoded = threading.Event()
    pool.when_decoded([frame], decoded.set)
    assert decoded.wait(10)
    pool.close()
    assert frame.pixels is None
    assert pool.decoded == 0


def test_pool_keeps_no_picture_alive() -> None:
    """Without a reference cycle, or megabytes would wait for the garbage collector."""
    rig = Rig("test", (CameraSpec("front", 1, "/front", "compressed", 10.0),), "/odometry", None)
    pool = DecodePool(rig, threads=1)
    frames = [Frame(1, k, 0, compressed(JPEG)) for k in range(3)]
    pictures = []
    decoded = threading.Event()

    def then(held: list[Frame] = frames) -> None:
        pictures.extend(weakref.ref(frame.pixels) for frame in held if frame.pixels is not None)
        decoded.set()

    gc.collect()
    gc.disable()
    try:
        pool.when_decoded(frames, then)
        assert decoded.wait(10)
        pool.close()
        assert len(pictures) == 3
        del then, frames
        assert [picture() for picture in pictures] == [None, None, None]
    finally:
        gc.enable()


def test_closed_pool_calls_whoever_waits() -> None:
    rig = Rig("test", (CameraSpec("front", 1, "/front", "compressed", 10.0),), "/odometry", None)
    pool = DecodePool(rig, threads=1)
    done: list[int] = []
    for k in range(50):
        pool.when_decoded([Frame(1, k, 0, compressed(JPEG))], lambda k=k: done.append(k))
    pool.close()
    pool.when_decoded([Frame(1, 50, 0, compressed(JPEG))], lambda: done.append(50))
    assert done == list(range(51))
