import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.painted_frames import MAX_FRAME, Painted, UnreadableError, paint, paint_jpeg, read_painted


@settings(max_examples=60, deadline=None)
@given(
    camera=st.integers(0, 15),
    frame=st.integers(0, MAX_FRAME),
    size=st.sampled_from([(160, 96), (320, 192), (641, 363)]),
    quality=st.integers(40, 95),
    seen=st.sampled_from([(320, 192), (100, 60), (576, 320)]),
)
def test_code_survives_jpeg_and_resize(camera, frame, size, quality, seen):
    jpeg = paint_jpeg(camera, frame, *size, quality=quality)
    image = cv2.resize(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR), seen)
    assert read_painted(image) == Painted(camera, frame)
    assert read_painted(image[:, :, 0]) == Painted(camera, frame)


def test_other_pictures_are_refused():
    noise = np.random.default_rng(0).integers(0, 255, (192, 320, 3), dtype=np.uint8)
    with pytest.raises(UnreadableError, match="checksum"):
        read_painted(noise)
    with pytest.raises(UnreadableError, match="checksum"):
        read_painted(paint(1, 12345)[::-1])
