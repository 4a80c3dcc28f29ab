"""Open loop over worlds: planned paths against the expert's, stated decisions against its reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.devices import Progress
from flashdrive_node.evaluation.metrics import path_errors
from flashdrive_node.evaluation.policies import EXPERT, Policy, make_policy
from flashdrive_node.evaluation.world_windows import WindowChoice, WorldWindows, world_windows
from flashdrive_node.model.errors import InputError
from flashdrive_node.world.decision_text import parse
from flashdrive_node.world.frames import FrameSettings

#: Scenes that are simulated together.
_SCENES = 500


@dataclass
class WindowRow:
    """How one window was answered."""

    policy: str
    index: int
    step: int
    natural: bool
    balanced: bool
    #: Class of the expert's decision, see `StatedDecision.label`.
    label: str
    sentence: str
    #: Of `metrics.path_errors`, metres.
    errors: dict[str, float]
    #: Only where the policy gives a reason.
    text: str | None = None
    #: The stated class, or None where the wording could not have made the text.
    stated: str | None = None
    #: Class right; class and what happens to the speed right.
    cause_right: bool | None = None
    decision_right: bool | None = None


@dataclass(frozen=True)
class OpenLoopWork:
    """Answering windows by policies that are made where they run, for `devices.spread`."""

    policies: tuple[str, ...]
    model: PlainSettings
    choice: WindowChoice = field(default_factory=WindowChoice)
    #: Windows at once.
    batch: int = 256
    #: Width and height of the pictures.
    size: tuple[int, int] = (288, 160)

    def __post_init__(self) -> None:
        if self.batch < 1 or not self.policies or EXPERT in self.policies:
            raise InputError(
                "at least 1 window at once and policies that plan are required (the expert is what they are measured "
                f"against), found {self.batch} and {', '.join(self.policies) or 'none'}"
            )

    def total(self, indices: Sequence[int]) -> int:
        """Policies times runs of scenes; how many windows these have is known behind the drive."""
        return len(self.policies) * math.ceil(len(indices) / _SCENES)

    def __call__(self, indices: Sequence[int], device: str, progress: Progress) -> list[WindowRow]:
        """A row per window and policy."""
        policies = [make_policy(name, replace(self.model, device=device), self.batch) for name in self.policies]
        frames = FrameSettings.for_device(device, *self.size)
        rows: list[WindowRow] = []
        for first in range(0, len(indices), _SCENES):
            windows = world_windows(indices[first : first + _SCENES], self.choice, device)
            for policy in policies:
                assert policy is not None
                rows += answer(policy, windows, frames if policy.sees else None, self.batch)
                progress(1)
        return rows


def answer(policy: Policy, windows: WorldWindows, frames: FrameSettings | None, batch: int) -> list[WindowRow]:
    """Let a policy plan in every window, and compare.

    Args:
        policy: Who plans.
        windows: With the truth.
        frames: How pictures are made, for policies that see.
        batch: Windows at once.
    """
    rows = []
    for first in range(0, len(windows), batch):
        part = range(first, min(first + batch, len(windows)))
        plans = policy.plan(windows.observe(part, frames))
        truth, yaw = (t[part.start : part.stop].cpu().numpy() for t in (windows.future_xy, windows.future_yaw))
        errors = path_errors(_finite(plans.xy), truth, yaw, plans.chosen.cpu().numpy())
        for i, row in enumerate(part):
            text = None if plans.texts is None else plans.texts[i]
            rows.append(_row(policy.name, windows, row, {k: float(v[i]) for k, v in errors.items()}, text))
    return rows


def _finite(xy: torch.Tensor) -> np.ndarray:
    """Paths as an array; one that is not finite counts as standing still."""
    bad = ~xy.isfinite().flatten(2).all(dim=2)
    return xy.masked_fill(bad[..., None, None], 0.0).cpu().numpy()


def _row(policy: str, windows: WorldWindows, row: int, errors: dict[str, float], text: str | None) -> WindowRow:
    truth = windows.decisions[row]
    result = WindowRow(
        policy,
        windows.index[row],
        windows.step[row],
        windows.natural[row],
        windows.balanced[row],
        truth.label,
        windows.sentences[row],
        errors,
    )
    if text is not None:
        stated = parse(text)
        result.text, result.stated = text, stated and stated.label
        result.cause_right = stated is not None and stated.label == truth.label
        result.decision_right = stated == truth
    return result
