"""What linear layers meet when a model drives: rows of their inputs, drawn over windows."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.clip import ClipSource, Window
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.training.text_windows import TextWindow, recorded_window


@dataclass(frozen=True)
class InputSettings:
    """Which rows are kept."""

    #: Windows to drive over at most; every fourth is held out.
    windows: int = 16
    #: Every so-manieth window of a clip: neighbours resemble each other.
    stride: int = 10
    #: Rows of a layer per window: of the prompt, and as many of what is decoded.
    rows: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        if self.windows < 2 or self.stride < 1 or self.rows < 1:
            raise InputError(
                "calibration: 2 windows, a stride and rows of 1 or more are required, "
                f"found {self.windows}, {self.stride} and {self.rows}"
            )


@dataclass(frozen=True)
class LayerInputs:
    """Rows [rows, K] by layer, on the host and in the model's type: to fit on, and of other windows."""

    fit: dict[str, Tensor]
    held_out: dict[str, Tensor]
    #: Size of the largest input of other layers, over all windows.
    largest: dict[str, float] = field(default_factory=dict)
    #: Prompts and texts of the same windows, where they were asked for.
    windows: list[TextWindow] = field(default_factory=list)
    held_out_windows: list[TextWindow] = field(default_factory=list)

    def rows(self, layer: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """What a layer met, and what it met on windows that are held out."""
        return self.fit[layer].to(device), self.held_out[layer].to(device)


class _Recorder:
    """Keeps some rows of every call of the layers."""

    def __init__(self, rows: int, seed: int):
        self.rows = rows
        self.seed = seed
        self.kept: dict[str, list[Tensor]] = defaultdict(list)
        self._decoded: dict[str, int] = defaultdict(int)
        self._generators: dict[str, torch.Generator] = {}

    def next_window(self) -> None:
        self._decoded.clear()

    def take(self, name: str, x: Tensor) -> None:
        """Rows [tokens, K]: single ones as long as there is room, of a prompt a sample."""
        if len(x) == 1:
            self._decoded[name] += 1
            if self._decoded[name] > self.rows:
                return
        # Of its own for each layer, so that a layer's rows do not depend on which others are left to do.
        if name not in self._generators:
            self._generators[name] = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        chosen = torch.randperm(len(x), generator=self._generators[name])[: self.rows].to(x.device)
        self.kept[name].append(x[chosen].cpu())

    def joined(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.kept.items()}


class _Largest:
    """Keeps the size of the largest input of every layer."""

    def __init__(self) -> None:
        self.met: dict[str, Tensor] = {}

    def take(self, name: str, x: Tensor) -> None:
        largest = x.abs().amax().float()
        self.met[name] = torch.maximum(self.met.get(name, largest), largest)

    def values(self) -> dict[str, float]:
        return {name: float(largest) for name, largest in self.met.items()}


def collect_inputs(
    loaded: LoadedModel,
    source: ClipSource,
    layers: Sequence[str],
    settings: InputSettings,
    measured: Sequence[str] = (),
    with_windows: bool = False,
) -> LayerInputs:
    """Let a model answer windows, and keep rows of what its layers were given.

    Args:
        loaded: The model.
        source: Windows to drive over.
        layers: Names of linear layers in the model.
        settings: Which rows.
        measured: Names of linear layers whose largest input is wanted.
        with_windows: Keep prompts and texts, too.

    Raises:
        InputError: Fewer than two windows.
        EngineError, ClipError: A window cannot be used.
    """
    engine = PlainEngine(PlainSettings("loaded", device=str(loaded.model.device), seed=settings.seed), loaded)
    fit, held_out = _Recorder(settings.rows, settings.seed), _Recorder(settings.rows, settings.seed + 1)
    largest = _Largest()
    told: tuple[list[TextWindow], list[TextWindow]] = ([], [])
    count = 0
    with tqdm(total=settings.windows, desc="driving", unit="window") as bar:
        for window in _windows(source, settings):
            recorder = held_out if count % 4 == 1 else fit
            recorder.next_window()
            watched = {name: [largest.take] for name in measured} | {
                name: [recorder.take, *([largest.take] if name in measured else [])] for name in layers
            }
            with ExitStack() as watching:
                watching.enter_context(_recorded(loaded.model, watched))
                answered = watching.enter_context(recorded_window(loaded.model.language)) if with_windows else []
                engine.step(window.observation)
            told[count % 4 == 1].extend(answered)  # there once the window is not watched any more
            count += 1
            bar.update()
        bar.total = count  # the limit may be more than there is
    if count < 2:
        raise InputError(f"{source.name}: 2 windows to calibrate on are required, found {count}")
    return LayerInputs(fit.joined(), held_out.joined(), largest.values(), *told)


def _windows(source: ClipSource, settings: InputSettings) -> Iterator[Window]:
    """Windows of one clip after the other, as many of each as make up the number."""
    left = settings.windows
    clips = max(len(source), 1)
    share = -(-settings.windows // clips)
    for clip in source.clips():
        of_clip = 0
        for window in clip.every(settings.stride):
            yield window
            left, of_clip = left - 1, of_clip + 1
            if not left:
                return
            if of_clip == share:
                break


@contextmanager
def _recorded(model: nn.Module, watched: Mapping[str, Sequence[Callable[[str, Tensor], None]]]) -> Iterator[None]:
    """Show the inputs of layers, as rows, to those who watch them."""

    def hook(name: str) -> Any:
        def show(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for take in watched[name]:
                take(name, inputs[0].detach().flatten(0, -2))

        return show

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
