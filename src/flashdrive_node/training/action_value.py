"""What a text is worth to the action: how far the expert's path strays from the driven one when that text is committed.

Texts are put behind prompts whose keys and values are there, and closed where they do not close themselves; the flow
starts at the same noise for all texts of a window, so a difference between two texts is theirs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.model import batched
from flashdrive_node.model.batched import BatchContext
from flashdrive_node.model.flow_matching import integrate
from flashdrive_node.training.rollouts import Samples


@dataclass(frozen=True)
class ActionValue:
    """Measures texts of windows."""

    policy: BatchedPolicy
    #: Steps of the flow; few are enough to compare.
    flow_steps: int = 4

    @torch.no_grad()
    def errors(self, samples: Samples, rows: Tensor, texts: Sequence[Sequence[int]], noise: Tensor) -> Tensor:
        """Mean distance of planned from driven points over 6.4 s, metres, float32 [M].

        Args:
            samples: Windows with their contexts and what was driven.
            rows: The window of each text, int64 [M].
            texts: Generated tokens; what is missing of their end is added.
            noise: Starting points of the flow, one per window, float32 [B, 64, 2].
        """
        model = self.policy.model
        context = self._committed(samples, rows, texts)
        action = integrate(batched.velocity_field(model, context, 1), noise[rows][:, None], self.flow_steps)
        height = torch.zeros(len(rows), 1, device=model.device)
        speed = samples.speeds[rows][:, None]
        planned, driven = (
            model.action_space.to_path(a, speed, height).xyz[..., :2]
            for a in (action, samples.actions[rows][:, None].to(action.dtype))
        )
        return (planned - driven).norm(dim=-1).mean(dim=-1)[:, 0].float()

    def _committed(self, samples: Samples, rows: Tensor, texts: Sequence[Sequence[int]]) -> BatchContext:
        """Contexts of windows with other texts behind their prompts, in tensors of their own."""
        model, rule = self.policy.model, self.policy.rule
        ended = [self.closed(text) for text in texts]
        lengths = torch.tensor([len(text) for text in ended], device=model.device)
        longest = int(lengths.max())
        ids = torch.tensor([text + [rule.pad] * (longest - len(text)) for text in ended], device=model.device)
        context = samples.context
        prompts = (context.lengths - samples_text_lengths(samples))[rows]
        slots = max(context.keys[0].shape[2], int(prompts.max()) + longest)

        def own(layers: list[Tensor]) -> list[Tensor]:
            return [pad(layer[rows], (0, 0, 0, slots - layer.shape[2])) for layer in layers]

        copied = replace(context, keys=own(context.keys), values=own(context.values), missing=0)
        batched.run_behind(model, copied, ids, prompts)
        copied.lengths = prompts + lengths
        return copied

    def closed(self, text: Sequence[int]) -> list[int]:
        """A text up to its end, or brought to it: end of the reasoning, then the token behind which waypoints come."""
        stop, closing = self.policy.rule.stop, self.policy.tokenizer.id("cot_end")
        assert stop is not None
        kept = list(text)
        for end in (stop, closing):
            if end in kept:
                kept = kept[: kept.index(end)]
        return [*kept, closing, stop]


def samples_text_lengths(samples: Samples) -> Tensor:
    """Tokens of the text of each window, int64 [B].

    Raises:
        ValueError: The samples have no records.
    """
    if samples.records is None:
        raise ValueError("samples with records are required, found none")
    return samples.records.lengths
