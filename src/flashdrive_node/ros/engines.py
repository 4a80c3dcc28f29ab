"""From the node's parameters to an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashdrive_node.engine.fake import FakeEngine, FakeSettings
from flashdrive_node.engine.protocol import Engine
from flashdrive_node.ros.parameters import ParameterError, Parameters, chosen_stages
from flashdrive_node.runtime.rig import Rig


@dataclass(frozen=True)
class EngineChoice:
    """An engine that is still to be made; ``make`` is called by the thread that will own it."""

    make: Callable[[], Engine]
    #: The fake engine, whose latency and faults can be changed while it runs.
    fake: FakeEngine | None = None


def choose_engine(parameters: Parameters, rig: Rig) -> EngineChoice:
    """The engine that the parameters ask for. Nothing is loaded yet.

    Raises:
        ParameterError: The engine's own parameters are incomplete or wrong.
    """
    if parameters.engine == "fake":
        settings = FakeSettings(
            latency_s=parameters.fake_latency_s,
            load_s=parameters.fake_load_s,
            samples=parameters.num_samples,
            probe=parameters.fake_probe or None,
        )
        try:
            fake = FakeEngine(settings)
        except ValueError as error:
            raise ParameterError([str(error)]) from error
        adjust_fake(fake, parameters)
        return EngineChoice(lambda: fake, fake)
    if not parameters.checkpoint:
        raise ParameterError(
            [
                f"parameter 'checkpoint' is required by engine '{parameters.engine}': a directory or a Hugging Face "
                "id; it is empty"
            ]
        )
    if parameters.engine == "streaming":
        return EngineChoice(lambda: _streaming(parameters, rig))
    return EngineChoice(lambda: _plain(parameters, rig))


def adjust_fake(engine: FakeEngine, parameters: Parameters) -> None:
    """Apply what may change while the fake engine runs."""
    engine.set_latency(parameters.fake_latency_s)
    engine.set_fault(parameters.fake_fault)  # type: ignore[arg-type]  # the table's choices are the engine's


# The networks are imported in the engine's thread and only where they are used: torch takes seconds, and the fake
# engine needs none.


def _plain(parameters: Parameters, rig: Rig) -> Engine:
    from flashdrive_node.engine.plain import PlainEngine
    from flashdrive_node.engine.settings import PlainSettings

    return PlainEngine(PlainSettings(flow_steps=parameters.flow_steps, **_common(parameters, rig)))


def _streaming(parameters: Parameters, rig: Rig) -> Engine:
    from flashdrive_node.engine.flow_schedule import FlowSchedule
    from flashdrive_node.engine.settings import StreamingSettings
    from flashdrive_node.engine.stream import StreamSettings
    from flashdrive_node.engine.streaming import StreamingEngine

    schedule = FlowSchedule.parse(parameters.flow_schedule) if parameters.flow_schedule else None
    stream = StreamSettings(
        mode=parameters.stream_mode,  # type: ignore[arg-type]  # the table's choices are the engine's
        refresh_every=parameters.refresh_every,
        refresh_views=parameters.refresh_views,
    )
    return StreamingEngine(
        StreamingSettings(
            stream=stream,
            schedule=schedule,
            flow_steps=parameters.flow_steps if schedule is None else None,
            drafter=Path(parameters.drafter) if parameters.drafter else None,
            draft_confidence=parameters.draft_confidence,
            shared_text=parameters.shared_text,
            frames_ahead=parameters.ingest,
            **_common(parameters, rig),
        )
    )


def _common(parameters: Parameters, rig: Rig) -> dict[str, Any]:
    """Settings that all engines with networks share."""
    from flashdrive_node.engine.settings import PlainSettings
    from flashdrive_node.model.sampling import SamplingSettings

    sizes = [(camera.height, camera.width) for camera in rig.cameras if camera.height and camera.width]
    return {
        "checkpoint": parameters.checkpoint,
        "revision": parameters.revision or None,
        "allow_download": parameters.allow_download,
        "overlay": Path(parameters.overlay) if parameters.overlay else None,
        "device": parameters.device,
        "precision": _precision(parameters),
        "samples": parameters.num_samples,
        "sampling": SamplingSettings(
            temperature=parameters.temperature,
            top_p=parameters.top_p,
            top_k=parameters.top_k or None,
            max_length=parameters.max_generation_length,
        ),
        "noise_temperature": parameters.noise_temperature,
        "guidance_weight": parameters.guidance_weight,
        "seed": parameters.seed,
        "cameras": tuple(camera.index for camera in rig.cameras),
        # The warm-up window is to look like the real ones.
        "image_size": sizes[0] if sizes else PlainSettings.image_size,
    }


def _precision(parameters: Parameters) -> str:
    """The precision with the stages that are set on their own, as the engines take it."""
    from flashdrive_node.model.loading import DTYPES
    from flashdrive_node.model.precision import StagePrecision

    stages = chosen_stages(parameters)
    if not stages:
        return parameters.precision
    base = StagePrecision() if parameters.precision in DTYPES else StagePrecision.parse(parameters.precision)
    return ",".join(f"{stage}={kind}" for stage, kind in (base.as_dict() | stages).items())
