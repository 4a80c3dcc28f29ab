"""Camera rigs: which topic carries which camera of the model, at which rate and size. One YAML file per rig."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

#: Camera indices of the model by PhysicalAI name.
CAMERA_INDICES = {
    "camera_cross_left_120fov": 0,
    "camera_front_wide_120fov": 1,
    "camera_cross_right_120fov": 2,
    "camera_rear_left_70fov": 3,
    "camera_rear_tele_30fov": 4,
    "camera_rear_right_70fov": 5,
    "camera_front_tele_30fov": 6,
}

#: Topics under the node's name, beside those of the cameras.
ODOMETRY_INPUT = "~/input/odometry"
NAVIGATION_INPUT = "~/input/navigation"

TRANSPORTS = ("compressed", "raw")


class RigError(ValueError):
    """A rig that cannot be used; lists every problem of the file."""

    def __init__(self, where: str, problems: list[str]):
        self.where = where
        self.problems = problems
        super().__init__(f"{where}: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in problems))


@dataclass(frozen=True)
class CameraSpec:
    """One camera of a rig."""

    #: Name in topics, diagnostics and error messages, for example "front_wide".
    name: str
    #: Index of the camera in the model's naming, 0 to 6.
    index: int
    #: Topic that carries its images.
    topic: str
    #: "compressed" (sensor_msgs/CompressedImage) or "raw" (sensor_msgs/Image).
    transport: str
    rate_hz: float
    #: Size that every image must have, pixels; None takes the first image's size.
    width: int | None = None
    height: int | None = None
    #: Largest accepted message payload, bytes.
    max_bytes: int = 32 * 1024 * 1024
    camera_info_topic: str | None = None

    @property
    def input_topic(self) -> str:
        """Topic of its images under the node's name, as image_transport would call it."""
        return f"~/input/{self.name}/image" + ("/compressed" if self.transport == "compressed" else "")

    @property
    def info_input_topic(self) -> str:
        """Topic of its CameraInfo under the node's name."""
        return f"~/input/{self.name}/camera_info"


@dataclass(frozen=True)
class Rig:
    """The sensors of one vehicle."""

    name: str
    #: In ascending order of index.
    cameras: tuple[CameraSpec, ...]
    odometry_topic: str
    navigation_topic: str | None
    #: Vehicle frame: x forward, y left, z up, on the ground under the rear axle.
    base_frame: str = "base_link"
    #: Size of the body for drawing, metres, and distance from the rear axle to the rear bumper.
    vehicle_length_m: float = 4.8
    vehicle_width_m: float = 1.9
    vehicle_height_m: float = 1.6
    rear_overhang_m: float = 1.0

    @property
    def reference(self) -> CameraSpec:
        """The camera whose stamps are the candidates for t0: the slowest; of those front wide, else the first."""
        slowest = min(camera.rate_hz for camera in self.cameras)
        candidates = [camera for camera in self.cameras if camera.rate_hz == slowest]
        return next((camera for camera in candidates if camera.index == 1), candidates[0])

    def camera(self, index: int) -> CameraSpec:
        """The camera with this model index.

        Raises:
            KeyError: The rig has no such camera.
        """
        for spec in self.cameras:
            if spec.index == index:
                return spec
        raise KeyError(f"rig {self.name!r} has cameras {[c.index for c in self.cameras]}, not {index}")


def rig_remappings(rig: Rig) -> list[tuple[str, str]]:
    """Remappings from the node's input topics to the topics that the rig names."""
    remappings = []
    for camera in rig.cameras:
        remappings.append((camera.input_topic, camera.topic))
        if camera.camera_info_topic is not None:
            remappings.append((camera.info_input_topic, camera.camera_info_topic))
    remappings.append((ODOMETRY_INPUT, rig.odometry_topic))
    if rig.navigation_topic is not None:
        remappings.append((NAVIGATION_INPUT, rig.navigation_topic))
    return remappings


def share_directory() -> Path:
    """Directory that holds ``params/`` and ``launch/``: of the ROS installation, of the Python one, or the repository.

    Raises:
        FileNotFoundError: None of them has a ``params`` directory; lists where it was looked for.
    """
    prefixes = [p for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    candidates = [Path(p) / "share" / "flashdrive_node" for p in [*prefixes, sys.prefix]]
    candidates.append(Path(__file__).resolve().parents[3])
    for candidate in candidates:
        if (candidate / "params" / "rigs").is_dir():
            return candidate
    raise FileNotFoundError("no params/rigs directory in any of: " + ", ".join(str(c) for c in candidates))


def available_rigs() -> list[str]:
    """Names of the rigs that ship with the package."""
    return sorted(path.stem for path in (share_directory() / "params" / "rigs").glob("*.yaml"))


def load_rig(name_or_path: str | Path) -> Rig:
    """Read a rig by name (``params/rigs/NAME.yaml`` of the package) or by path (anything that ends in .yaml or .yml).

    Raises:
        RigError: No such file or name, not YAML, unknown or missing keys, wrong types or values; all at once.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = share_directory() / "params" / "rigs" / f"{name_or_path}.yaml"
        if not path.is_file():
            raise RigError(str(name_or_path), [f"no rig of this name; there are {', '.join(available_rigs())}"])
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RigError(str(path), [f"cannot be read: {error}"]) from error
    except yaml.YAMLError as error:
        raise RigError(str(path), [f"is not YAML: {error}"]) from error
    return parse_rig(document, str(path))


def parse_rig(document: Any, where: str) -> Rig:
    """Check a rig that was read from YAML and build it.

    Args:
        document: The parsed YAML.
        where: Name of the file for error messages.

    Raises:
        RigError: Lists every problem found.
    """
    reader = _Reader(document, "", [])
    name = reader.text("name")
    odometry_topic = reader.text("odometry_topic")
    navigation_topic = reader.optional_text("navigation_topic")
    base_frame = reader.optional_text("base_frame") or "base_link"
    vehicle_keys = ("length_m", "width_m", "height_m", "rear_overhang_m")
    vehicle = _Reader(reader.take("vehicle", {}), "vehicle.", reader.problems)
    sizes = {f"vehicle_{key}".replace("vehicle_rear", "rear"): vehicle.positive(key, None) for key in vehicle_keys}
    vehicle.finish()
    entries = reader.take("cameras", None)
    if not isinstance(entries, list) or not entries:
        reader.problems.append(f"key 'cameras' must be a list of at least one camera, found {entries!r}")
        entries = []
    reader.finish()
    cameras = [_camera(_Reader(entry, f"cameras[{i}].", reader.problems)) for i, entry in enumerate(entries)]
    for what in ("name", "index", "topic"):
        values = [getattr(camera, what) for camera in cameras]
        for value in sorted({v for v in values if values.count(v) > 1}, key=str):
            reader.problems.append(f"cameras: {what} {value!r} stands {values.count(value)} times, must be unique")
    if reader.problems:
        raise RigError(where, reader.problems)
    ordered = tuple(sorted(cameras, key=lambda camera: camera.index))
    given = {key: value for key, value in sizes.items() if value is not None}
    return Rig(name, ordered, odometry_topic, navigation_topic, base_frame, **given)


def _camera(reader: _Reader) -> CameraSpec:
    name = reader.text("name")
    if name and not (name.replace("_", "").isalnum() and name.isascii() and name[0].isalpha()):
        reader.problems.append(f"key '{reader.path}name' must be a ROS name (letters, digits, _), found {name!r}")
    index = reader.take("index", None)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= 6:
        reader.problems.append(f"key '{reader.path}index' must be an integer 0 to 6, found {index!r}")
        index = -1
    transport = reader.take("transport", "compressed")
    if transport not in TRANSPORTS:
        reader.problems.append(f"key '{reader.path}transport' must be one of {TRANSPORTS}, found {transport!r}")
    rate_hz = reader.positive("rate_hz", 0.0)
    if rate_hz and not 5.0 <= rate_hz <= 120.0:
        reader.problems.append(f"key '{reader.path}rate_hz' must be 5 to 120 Hz, found {rate_hz}")
    spec = CameraSpec(
        name=name,
        index=index,
        topic=reader.text("topic"),
        transport=transport,
        rate_hz=rate_hz or 0.0,
        width=reader.positive_int("width", None),
        height=reader.positive_int("height", None),
        max_bytes=reader.positive_int("max_bytes", CameraSpec.max_bytes) or 0,
        camera_info_topic=reader.optional_text("camera_info_topic"),
    )
    if (spec.width is None) != (spec.height is None):
        reader.problems.append(f"keys '{reader.path}width' and 'height' must be given together")
    reader.finish()
    return spec


class _Reader:
    """Takes keys out of one mapping and notes what is wrong; ``finish`` notes the keys that nobody took."""

    def __init__(self, source: Any, path: str, problems: list[str]):
        self.path = path
        self.problems = problems
        if not isinstance(source, dict):
            problems.append(f"{path.rstrip('.') or 'the file'} must be a mapping, found {type(source).__name__}")
            source = {}
        self.source: dict[Any, Any] = dict(source)

    def take(self, key: str, default: Any) -> Any:
        value = self.source.pop(key, None)
        return default if value is None else value

    def text(self, key: str) -> str:
        value = self.take(key, None)
        if not isinstance(value, str) or not value.strip():
            self.problems.append(f"key '{self.path}{key}' is required (text), found {value!r}")
            return ""
        return value

    def optional_text(self, key: str) -> str | None:
        value = self.take(key, None)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            self.problems.append(f"key '{self.path}{key}' must be text, found {value!r}")
            return None
        return value

    def positive(self, key: str, default: float | None) -> float | None:
        """A finite number above zero; ``default`` None makes the key optional."""
        value = self.take(key, None)
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            self.problems.append(f"key '{self.path}{key}' must be a number above 0, found {value!r}")
            return default
        return float(value)

    def positive_int(self, key: str, default: int | None) -> int | None:
        value = self.take(key, default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
            self.problems.append(f"key '{self.path}{key}' must be an integer above 0, found {value!r}")
            return default
        return value

    def finish(self) -> None:
        for key in self.source:
            self.problems.append(f"key '{self.path}{key}' is unknown")
