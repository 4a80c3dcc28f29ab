"""What the package carries in `data`: a small trained checkpoint, and a recording of a drive to play to it."""

from __future__ import annotations

from pathlib import Path

_DATA = Path(__file__).parent / "data"

#: What stands for the path of the checkpoint, or of the recording, on the command line and in parameters.
BUNDLED = "bundled"


def bundled_checkpoint() -> Path:
    """Directory of the small checkpoint, in the release's format."""
    return _DATA / "alpamayo_small"


def bundled_drive() -> Path:
    """Directory of the recording, a rosbag2 of 20 s with the topics of the rig ``sample``."""
    return _DATA / "sample_drive"
