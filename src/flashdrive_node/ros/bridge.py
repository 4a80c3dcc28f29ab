"""Encodings that the node's own decoder does not know, through the cv_bridge of a ROS installation where one works.

cv_bridge is not on PyPI, and the one of Jazzy fails with numpy 2: whether it works is found out by converting an image.
"""

from __future__ import annotations

import array
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import Image

from flashdrive_node.runtime.observation import RawImage

logger = logging.getLogger(__name__)

#: From a serialised sensor_msgs/Image and what was read of it to the same image in rgb8.
Converter = Callable[[bytes, RawImage], RawImage]


class BridgeError(ValueError):
    """cv_bridge cannot convert an image."""


def load_converter() -> Converter | None:
    """A converter through cv_bridge, or None where it is not installed or does not work."""
    try:
        from cv_bridge import CvBridge

        bridge = CvBridge()
        blue = Image(height=1, width=2, encoding="bgr8", step=6, data=array.array("B", [255, 0, 0] * 2))
        if np.asarray(bridge.imgmsg_to_cv2(blue, "rgb8")).tolist() != [[[0, 0, 255]] * 2]:
            raise BridgeError("it does not convert bgr8 to rgb8")
    except ModuleNotFoundError:
        return None
    except Exception as error:  # whatever a module that was built for another numpy raises
        logger.info("cv_bridge is installed and does not work (%s): only the node's own encodings are decoded", error)
        return None

    def convert(message: bytes, image: RawImage) -> RawImage:
        try:
            pixels = np.ascontiguousarray(bridge.imgmsg_to_cv2(deserialize_message(message, Image), "rgb8"), np.uint8)
        except Exception as error:
            raise BridgeError(f"cv_bridge cannot convert encoding {image.encoding!r}: {error}") from error
        return replace(image, encoding="rgb8", step=3 * image.width, is_bigendian=False, data=pixels.reshape(-1))

    return convert
