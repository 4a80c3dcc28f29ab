"""From the node's parameters to an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashdrive_node.engine.fake import FakeEngine, FakeSettings
from flashdrive_node.engine.protocol import Engine
from flashdrive_node.ros.parameters import ParameterError, Parameters
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
            ["parameter 'checkpoint' is required by engine 'plain': a directory or a Hugging Face id; it is empty"]
        )
    return EngineChoice(lambda: _plain(parameters, rig))


def adjust_fake(engine: FakeEngine, parameters: Parameters) -> None:
    """Apply what may change while the fake engine runs."""
    engine.set_latency(parameters.fake_latency_s)
    engine.set_fault(parameters.fake_fault)  # type: ignore[arg-type]  # the table's choices are the engine's


def _plain(parameters: Parameters, rig: Rig) -> Engine:
    # Imported in the engine's thread and only where it is used: torch takes seconds, and the fake engine needs none.
    from flashdrive_node.engine.plain import PlainEngine, PlainSettings
    from flashdrive_node.model.sampling import SamplingSettings

    sizes = [(camera.height, camera.width) for camera in rig.cameras if camera.height and camera.width]
    return PlainEngine(
        PlainSettings(
            checkpoint=parameters.checkpoint,
            revision=parameters.revision or None,
            allow_download=parameters.allow_download,
            overlay=Path(parameters.overlay) if parameters.overlay else None,
            device=parameters.device,
            precision=parameters.precision,
            samples=parameters.num_samples,
            sampling=SamplingSettings(
                temperature=parameters.temperature,
                top_p=parameters.top_p,
                top_k=parameters.top_k or None,
                max_length=parameters.max_generation_length,
            ),
            flow_steps=parameters.flow_steps,
            guidance_weight=parameters.guidance_weight,
            noise_temperature=parameters.noise_temperature,
            seed=parameters.seed,
            cameras=tuple(camera.index for camera in rig.cameras),
            # The warm-up window is to look like the real ones.
            image_size=sizes[0] if sizes else PlainSettings.image_size,
        )
    )
