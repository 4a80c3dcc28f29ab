"""What the package carries in `data`: a small trained checkpoint with what its streams use, and a recording of a drive.

Drafter and expert for streams are optional: they are there as soon as their files lie beside the checkpoint's.
"""

from __future__ import annotations

from pathlib import Path

_DATA = Path(__file__).parent / "data"

#: What stands for the path of the checkpoint, or of the recording, on the command line and in parameters.
BUNDLED = "bundled"


def bundled_checkpoint() -> Path:
    """Directory of the small checkpoint, in the release's format."""
    return _DATA / "alpamayo_small"


def bundled_drafter() -> Path | None:
    """Directory of the drafter of the small checkpoint, or None where the package has none."""
    path = bundled_checkpoint() / "drafter"
    return path if path.is_dir() else None


def bundled_overlay() -> Path | None:
    """File of the small checkpoint's expert for streams in mode kv, or None where the package has none."""
    path = bundled_checkpoint() / "streaming" / "expert.safetensors"
    return path if path.is_file() else None


def bundled_drive() -> Path:
    """Directory of the recording, a rosbag2 of 20 s with the topics of the rig ``sample``."""
    return _DATA / "sample_drive"
