"""What the node says about itself: one status per camera, odometry, navigation, inference and engine.

Every function turns snapshots into a DiagnosticStatus; nothing here has state. The inference status is in exactly one
state at a time, its message begins with the state and goes on with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from flashdrive_node.runtime.frames import Refusal
from flashdrive_node.runtime.outcome import WorkerStatus
from flashdrive_node.runtime.pipeline import CameraStatus, PipelineStatus
from flashdrive_node.runtime.rig import CameraSpec
from flashdrive_node.runtime.timing import StageStatistics

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR

#: An input counts as silent after this many of its periods, and never before the minimum.
SILENT_PERIODS, SILENT_MIN_S = 3.0, 0.5
#: How long an image or odometry that was refused is reported.
ERROR_SHOWN_S = 2.0
#: Windows may fail to come for this long (a lost frame) before it is an error.
QUIET_S = 0.5
#: After activation or a reset: 1.5 s of odometry and 0.3 s of frames have to come in first.
SETTLING_S = 3.0
#: Shares of the expected rate below and above which a camera is reported.
LOW_RATE, HIGH_RATE = 0.75, 1.5


@dataclass
class Publication:
    """What happened to the windows so far; kept by the node."""

    published: int = 0
    #: Withheld results by the kind of violation.
    withheld: dict[str, int] = field(default_factory=dict)
    #: The newest window's end: "", "published", "withheld" or "failed", why, and when (monotonic seconds).
    last: str = ""
    last_text: str = ""
    last_s: float = 0.0
    #: Monotonic seconds of activation or of the newest reset, and what it was.
    since_s: float = 0.0
    since_text: str = ""
    #: Age of t0 when the newest result went out.
    age_ms: float = 0.0


@dataclass(frozen=True)
class NodeState:
    """Where the lifecycle stands."""

    #: "unconfigured", "inactive" or "active".
    lifecycle: str
    paused: bool = False
    #: Why configuring failed, or "".
    configure_error: str = ""


def inference_status(
    node: NodeState, pipeline: PipelineStatus | None, publication: Publication, now_s: float
) -> DiagnosticStatus:
    """The one state that the node is in, and why."""
    level, state, reason = _inference(node, pipeline, publication, now_s)
    values: dict[str, Any] = {
        "state": state,
        "published": publication.published,
        "age_ms": f"{publication.age_ms:.1f}",
        **{f"withheld_{kind}": count for kind, count in publication.withheld.items()},
    }
    if pipeline is not None:
        values["windows"] = pipeline.windows_taken
        values |= {f"windows_{kind}": count for kind, count in pipeline.worker.counts.items()}
        values |= {f"reset_{cause}": count for cause, count in pipeline.resets.items()}
        values["last_reset"] = pipeline.last_reset
    return _status("inference", level, f"{state}: {reason}" if reason else state, values)


def _inference(
    node: NodeState, pipeline: PipelineStatus | None, publication: Publication, now_s: float
) -> tuple[bytes, str, str]:
    if node.configure_error:
        return ERROR, "configure failed", node.configure_error
    if pipeline is None:
        return OK, "unconfigured", ""
    worker = pipeline.worker
    if worker.state == "failed":
        return ERROR, "engine failed", worker.text
    if worker.hanging:
        return ERROR, "hanging", f"the engine has been computing one window for {worker.step_s:.1f} s"
    if worker.state in ("idle", "loading", "warming"):
        failed = f"; engine: {worker.last_error}" if worker.consecutive_failures else ""
        return WARN, "loading", f"{worker.text} {worker.progress:.0%}{failed}".strip()
    if node.lifecycle != "active":
        return OK, "inactive", "ready to be activated"
    if node.paused:
        return WARN, "paused", "by ~/pause"
    fresh_s = now_s - max(publication.last_s, publication.since_s)
    # What waits for its first window after an activation or a reset is settling, whatever is still missing.
    if publication.since_s > publication.last_s and fresh_s < SETTLING_S:
        missing = f"; {pipeline.refusal.text}" if pipeline.refusal is not None else ""
        return WARN, "starting", f"{publication.since_text}{missing}"
    if pipeline.refusal is not None and fresh_s > QUIET_S:
        return ERROR, "no window", _explained(pipeline.refusal, pipeline)
    if publication.last == "failed":
        return ERROR, "engine error", publication.last_text
    if publication.last == "withheld":
        return ERROR, "withheld", publication.last_text
    if fresh_s > QUIET_S and worker.state != "busy":
        return ERROR, "no window", "the inputs have stopped"
    return OK, "running", f"window {pipeline.windows_taken}, result {publication.age_ms:.0f} ms old when published"


def _recent_error(camera: CameraStatus) -> bool:
    return bool(camera.last_error) and camera.last_error_age_s < ERROR_SHOWN_S


def _explained(refusal: Refusal, pipeline: PipelineStatus) -> str:
    """The refusal, and where messages of its input were refused, why: that is the cause of what is missing."""
    if refusal.reason.startswith("odometry"):
        recent = pipeline.odometry_last_error_age_s < ERROR_SHOWN_S
        error = pipeline.odometry_last_error if recent else ""
    else:
        # A refusal that names no camera waits for all of them.
        named = [camera for camera in pipeline.cameras if refusal.camera in (camera.name, None)]
        error = next((camera.last_error for camera in named if _recent_error(camera)), "")
    return f"{refusal.text}; refused: {error}" if error and error not in refusal.text else refusal.text


def engine_status(
    worker: WorkerStatus | None, superseded: float, times: Mapping[str, StageStatistics]
) -> DiagnosticStatus:
    """The engine: what it is, what it does, and how long its stages take.

    Args:
        worker: Snapshot, or None while unconfigured.
        superseded: Share of the windows since the last report that a newer one replaced before the engine had time.
        times: Statistics of the stages.
    """
    if worker is None:
        return _status("engine", OK, "unconfigured", {})
    values: dict[str, Any] = {"state": worker.state, "progress": f"{worker.progress:.2f}"}
    if worker.info is not None:
        info = worker.info
        values |= {
            "name": info.name,
            "checkpoint": info.checkpoint,
            "sha256": info.sha256,
            "device": info.device,
            "precision": info.precision,
            "precision_reason": info.precision_reason,
        }
    values |= {f"{kind}": count for kind, count in worker.counts.items()}
    values["superseded_share"] = f"{superseded:.2f}"
    for stage, s in times.items():
        values |= {f"{stage}_p50_ms": f"{s.p50_ms:.2f}", f"{stage}_p99_ms": f"{s.p99_ms:.2f}"}
        values |= {f"{stage}_max_ms": f"{s.max_ms:.2f}"}
    if worker.state == "failed":
        return _status("engine", ERROR, f"failed: {worker.text}", values)
    if worker.hanging:
        return _status("engine", ERROR, f"hanging for {worker.step_s:.1f} s", values)
    if worker.consecutive_failures:
        text = f"{worker.consecutive_failures} windows failed in a row: {worker.last_error}"
        return _status("engine", ERROR, text, values)
    if worker.state not in ("ready", "busy"):
        return _status("engine", WARN, f"{worker.state}: {worker.text} {worker.progress:.0%}", values)
    if superseded > 0.1:
        text = f"slower than the windows come: {superseded:.0%} of them were replaced by newer ones"
        return _status("engine", WARN, text, values)
    return _status("engine", OK, worker.info.name if worker.info is not None else worker.state, values)


def camera_status(
    camera: CameraStatus, spec: CameraSpec, info: tuple[int, int] | None, active: bool, refusal: Refusal | None
) -> DiagnosticStatus:
    """One camera: rate, age, and where its frames went. ``refusal`` is why there is no window right now."""
    account = camera.account
    values: dict[str, Any] = {
        "index": camera.index,
        "rate_hz": f"{camera.rate_hz:.2f}",
        "expected_rate_hz": f"{spec.rate_hz:.2f}",
        "age_s": "" if camera.silent_s is None else f"{camera.silent_s:.3f}",
        "received": account.received,
        "used": account.used,
        "held": account.held,
        "non_increasing_stamps": account.non_increasing,
        **{f"dropped_{cause}": count for cause, count in account.dropped.items()},
        "last_error": camera.last_error,
    }
    if info is not None:
        values["camera_info"] = f"{info[0]}x{info[1]}"
    blocking = refusal is not None and refusal.camera == camera.name
    level, text = _camera(camera, spec, info, active, blocking)
    return _status(f"camera {camera.name}", level, text, values)


def _camera(
    camera: CameraStatus, spec: CameraSpec, info: tuple[int, int] | None, active: bool, blocking: bool
) -> tuple[bytes, str]:
    if not active:
        return OK, "inactive"
    recent = _recent_error(camera)
    silent = camera.silent_s is None or camera.silent_s > max(SILENT_MIN_S, SILENT_PERIODS / spec.rate_hz)
    if recent and (silent or (blocking and camera.last_error_age_s < QUIET_S)):
        return ERROR, camera.last_error
    if camera.silent_s is None:
        return ERROR, "nothing received"
    if silent:
        return ERROR, f"silent for {camera.silent_s:.1f} s"
    if camera.frozen:
        return ERROR, "frozen: it repeats one picture"
    if recent:
        return WARN, camera.last_error
    if info is not None and spec.width is not None and info != (spec.width, spec.height):
        return WARN, f"the rig says {spec.width}x{spec.height}, CameraInfo {info[0]}x{info[1]}"
    if 0 < camera.rate_hz < LOW_RATE * spec.rate_hz:
        return WARN, f"{camera.rate_hz:.1f} Hz, {spec.rate_hz:.0f} Hz are expected"
    if camera.rate_hz > HIGH_RATE * spec.rate_hz:
        return WARN, f"{camera.rate_hz:.1f} Hz, {spec.rate_hz:.0f} Hz are expected (do two drivers publish it?)"
    return OK, f"{camera.rate_hz:.1f} Hz"


def odometry_status(pipeline: PipelineStatus, active: bool) -> DiagnosticStatus:
    """Odometry: whether it comes, and what was refused."""
    values: dict[str, Any] = {
        "received": pipeline.odometry_received,
        **{f"dropped_{cause}": count for cause, count in pipeline.odometry_dropped.items()},
        "age_s": "" if pipeline.odometry_silent_s is None else f"{pipeline.odometry_silent_s:.3f}",
        "last_error": pipeline.odometry_last_error,
    }
    recent = bool(pipeline.odometry_last_error) and pipeline.odometry_last_error_age_s < ERROR_SHOWN_S
    silent_s = pipeline.odometry_silent_s
    silent = silent_s is None or silent_s > SILENT_MIN_S
    if recent and silent:
        level, text = ERROR, pipeline.odometry_last_error
    elif silent and active:
        level, text = ERROR, "nothing received" if silent_s is None else f"silent for {silent_s:.1f} s"
    elif recent:
        level, text = WARN, pipeline.odometry_last_error
    else:
        level, text = OK, "inactive" if silent else "fresh"
    return _status("odometry", level, text, values)


def navigation_status(text: str | None, problem: str) -> DiagnosticStatus:
    """The navigation text in use, and why the last one was refused or dropped."""
    if problem:
        return _status("navigation", WARN, problem, {"text": text or ""})
    return _status("navigation", OK, text or "none", {"text": text or ""})


def changed(before: Iterable[DiagnosticStatus], now: Iterable[DiagnosticStatus]) -> bool:
    """Whether a level changed, or the state of the inference: worth telling at once."""
    return [_essence(s) for s in before] != [_essence(s) for s in now]


def _essence(status: DiagnosticStatus) -> tuple[str, bytes, str]:
    return status.name, status.level, status.message.partition(":")[0] if status.name.endswith("inference") else ""


def _status(name: str, level: bytes, message: str, values: Mapping[str, Any]) -> DiagnosticStatus:
    return DiagnosticStatus(
        level=level,
        name=name,
        message=message,
        values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
    )
