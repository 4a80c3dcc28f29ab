"""cv_bridge, which pip does not have: stand-ins with its interface that work, are broken, and refuse."""

from __future__ import annotations

import array
import sys
import types

import numpy as np
import pytest
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image

from flashdrive_node.ros.bridge import BridgeError, load_converter
from flashdrive_node.ros.inputs import Inputs
from flashdrive_node.ros.serialized import raw_image
from flashdrive_node.runtime.rig import load_rig


class CvBridge:
    """``imgmsg_to_cv2`` of bgr8 and of packed 5-6-5 bits."""

    def imgmsg_to_cv2(self, message: Image, desired_encoding: str = "passthrough") -> np.ndarray:
        assert desired_encoding == "rgb8"
        if message.encoding == "bgr8":
            return np.array(message.data, np.uint8).reshape(message.height, message.width, 3)[..., ::-1]
        if message.encoding != "rgb565":
            raise RuntimeError(f"Unrecognized image encoding [{message.encoding}]")
        words = np.frombuffer(message.data, "<u2").reshape(message.height, message.width)
        return np.stack([(words >> 11) * 8, (words >> 5 & 63) * 4, (words & 31) * 8], axis=-1).astype(np.uint8)


class BuiltForAnotherNumpy:
    def __init__(self):
        raise AttributeError("_ARRAY_API not found")


class Swapped(CvBridge):
    def imgmsg_to_cv2(self, message: Image, desired_encoding: str = "passthrough") -> np.ndarray:
        return super().imgmsg_to_cv2(message, desired_encoding)[..., ::-1]


@pytest.fixture
def install(monkeypatch):
    def put(kind: type) -> None:
        module = types.ModuleType("cv_bridge")
        module.CvBridge = kind
        monkeypatch.setitem(sys.modules, "cv_bridge", module)

    return put


def serialized(encoding: str) -> bytes:
    data = np.array([[0xF800, 0x07E0, 0x001F]] * 2, "<u2").tobytes()
    return serialize_message(Image(height=2, width=3, step=6, encoding=encoding, data=array.array("B", data)))


def test_without_cv_bridge_there_is_no_converter():
    assert load_converter() is None


@pytest.mark.parametrize("kind", [BuiltForAnotherNumpy, Swapped])
def test_one_that_does_not_work_is_not_used(install, kind, caplog):
    install(kind)
    with caplog.at_level("INFO", logger="flashdrive_node"):
        assert load_converter() is None
    assert "does not work" in caplog.text


def test_a_further_encoding_becomes_rgb8(install):
    install(CvBridge)
    message = serialized("rgb565")
    image = load_converter()(message, raw_image(message))
    assert (image.encoding, image.width, image.height, image.step) == ("rgb8", 3, 2, 9)
    assert np.asarray(image.data).tolist() == [248, 0, 0, 0, 252, 0, 0, 0, 248] * 2


def test_what_it_cannot_convert_says_so(install):
    install(CvBridge)
    message = serialized("rgb13")
    with pytest.raises(BridgeError, match=r"cannot convert encoding 'rgb13'.*Unrecognized"):
        load_converter()(message, raw_image(message))


class RecordingPipeline:
    """Keeps what the subscriptions hand on."""

    def __init__(self):
        self.images, self.refused = [], []

    def on_image(self, camera_index, image, now_ns):
        self.images.append((camera_index, image))

    def refuse_image(self, camera_index, text):
        self.refused.append((camera_index, text))


def test_subscriptions_use_it_for_what_the_decoder_does_not_know(install, bench, tmp_path):
    install(CvBridge)
    path = tmp_path / "rig.yaml"
    path.write_text(
        "{name: raw, odometry_topic: /o, cameras: [{name: front, index: 1, topic: /f, transport: raw, rate_hz: 10.0}]}"
    )
    pipeline = RecordingPipeline()
    inputs = Inputs(bench.node, load_rig(path), pipeline, lambda text: None)
    for message in (serialized("rgb565"), serialized("mono16"), serialized("rgb13"), serialized("rgb565")[:30]):
        inputs._on_image(1, raw_image, message)
    inputs.destroy()
    assert [image.encoding for _, image in pipeline.images] == ["rgb8", "mono16"]
    assert ["rgb13" in text for _, text in pipeline.refused] == [True, False]
    assert "cut" in pipeline.refused[1][1]
