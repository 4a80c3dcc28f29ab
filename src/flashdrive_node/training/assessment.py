"""How well a model does on windows whose right answers are known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.evaluation.history_baseline import HistoryBaseline
from flashdrive_node.training.replay_buffer import Batch
from flashdrive_node.training.windows import Windows
from flashdrive_node.world.decision_text import StatedDecision, decision_of, parse
from flashdrive_node.world.expert import Cause
from flashdrive_node.world.reasoning import Pace, Start
from flashdrive_node.world.steering import Manoeuvre


def stated(decision: Sequence[int]) -> StatedDecision:
    """What a sentence about a row of `Windows.decision` states."""
    cause, pace, manoeuvre, start = decision
    return decision_of(Cause(cause), Pace(pace), Manoeuvre(manoeuvre), Start(start))


@torch.inference_mode()
def assess(
    policy: BatchedPolicy, baseline: HistoryBaseline, windows: Windows, samples: Batch, batch: int = 128
) -> dict[str, Any]:
    """Figures over windows.

    Args:
        policy: The model; its first trajectory counts.
        baseline: What it is measured against.
        windows, samples: The same windows, on the model's device.
        batch: Windows at a time.

    Returns:
        ADE and FDE over 6.4 s of the model and of the baseline, metres; shares of texts that state the right decision,
        its right class, and that state none; by class the number of windows, ADE, and accuracy.
    """
    space = policy.model.action_space
    truth = space.to_path(samples.actions, samples.speed).xyz
    errors, texts = [], []
    for first in range(0, len(windows), batch):
        rows = slice(first, first + batch)
        plan = policy.plan(
            samples.images[rows], samples.history_xyz[rows], samples.history_rot[rows], windows.navigation[rows]
        )
        errors.append((plan.xyz[:, 0] - truth[rows]).norm(dim=-1))
        texts += plan.texts
    error = torch.cat(errors)
    blind = baseline.plan(samples.history_xyz, samples.history_rot, windows.navigation).xyz
    blind_error = (blind - truth).norm(dim=-1)
    said = [parse(text) for text in texts]
    right = [stated(row) for row in windows.decision.tolist()]
    by_class: dict[str, list[int]] = defaultdict(list)
    for i, decision in enumerate(right):
        by_class[decision.label].append(i)

    def share(hits: Sequence[bool]) -> float:
        return sum(hits) / max(len(hits), 1)

    def accuracy(rows: Sequence[int]) -> float:
        return share([said[i] is not None and _label(said[i]) == right[i].label for i in rows])

    def mean(t: Tensor, rows: Sequence[int]) -> float:
        return float(t[list(rows)].mean())

    return {
        "windows": len(windows),
        "ade_m": float(error.mean()),
        "fde_m": float(error[:, -1].mean()),
        "history_ade_m": float(blind_error.mean()),
        "history_fde_m": float(blind_error[:, -1].mean()),
        "decision_accuracy": share([a == b for a, b in zip(said, right, strict=True)]),
        "class_accuracy": accuracy(range(len(windows))),
        "malformed": share([one is None for one in said]),
        "by_class": {
            name: {
                "windows": len(rows),
                "ade_m": mean(error, rows),
                "history_ade_m": mean(blind_error, rows),
                "accuracy": accuracy(rows),
            }
            for name, rows in sorted(by_class.items())
        },
    }


def _label(decision: StatedDecision | None) -> str:
    return decision.label if decision is not None else ""
