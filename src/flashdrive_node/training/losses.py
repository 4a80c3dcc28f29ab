"""What the small model learns from: reasoning, flow of actions, and auxiliary targets that the world knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    smooth_l1_loss,
)

from flashdrive_node.model import batched
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.batched import BatchContext
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.prompt_batch import PromptLayout
from flashdrive_node.training.initial_weights import linear
from flashdrive_node.training.pictures import CLASSES, presence_of
from flashdrive_node.training.replay_buffer import ANSWER_TOKENS, Batch
from flashdrive_node.training.windows import DECISION_FIELDS, GEOMETRY
from flashdrive_node.world.solids import Pixel

#: Share of each loss in the sum that is minimised.
WEIGHTS: Mapping[str, float] = {
    "text": 1.0,
    "flow": 1.0,
    "path": 0.15,
    "seen": 1.0,
    "understood": 0.5,
    "decision": 0.5,
    "geometry": 0.5,
    "plan": 0.3,
}
#: Weight of a positive for what covers few tokens: everything that stands on the road or rules it.
_RARE_WEIGHT = 4.0
#: Divides sums of errors over the waypoints, so that white errors keep about their size.
_SUM_SCALE = 8.0


class AuxiliaryHeads(nn.Module):
    """Linear read-outs of hidden states, used in training only."""

    def __init__(self, config: AlpamayoConfig):
        super().__init__()
        hidden = config.text.hidden_size
        #: Classes and distance per image token, from the vision tower and behind the language model.
        self.seen = linear(hidden, CLASSES + 1)
        self.understood = linear(hidden, CLASSES + 1)
        #: From the last token of the prompt.
        self.decision = linear(hidden, sum(DECISION_FIELDS.values()))
        self.geometry = linear(hidden, len(GEOMETRY))
        self.plan = linear(hidden, 2 * config.action_space.n_waypoints)


def losses(
    model: Alpamayo,
    heads: AuxiliaryHeads,
    batch: Batch,
    layout: PromptLayout,
    draws: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """All losses of a batch, by the names in `WEIGHTS`, float32 scalars.

    Args:
        model: The network, in training.
        heads: Of the model's type.
        batch: B samples on the model's device.
        layout: Of the samples' prompts.
        draws: Noisy actions per sample.
        generator: Of noise and flow times, on the same device.
    """
    features = batched.encode_images(model, batch.images)
    positions = layout.positions(batch.ids.shape[1])
    hidden, keys, values = batched.prefill(model, batch.ids, positions, features, layout.image_index)
    last = batched.last_hidden(hidden, batch.prompt_lengths)
    context = BatchContext(keys, values, batch.lengths, layout.rope_delta)
    flow, path = _flow_losses(model, context, batch.actions, draws, generator)
    return {
        "text": _text_loss(model, hidden, batch),
        "flow": flow,
        "path": path,
        "seen": _token_loss(heads.seen(features.embeds), batch),
        "understood": _token_loss(heads.understood(hidden[:, layout.image_index]), batch),
        "decision": _decision_loss(heads.decision(last).float(), batch.decision),
        "geometry": _geometry_loss(heads.geometry(last).float(), batch),
        "plan": _plan_loss(heads.plan(last).float().view_as(batch.actions), batch.actions),
    }


def _text_loss(model: Alpamayo, hidden: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the answers' tokens, averaged over them."""
    place = (batch.prompt_lengths - 1)[:, None] + torch.arange(ANSWER_TOKENS, device=hidden.device)
    answer = place + 1 < batch.lengths[:, None]
    place = torch.minimum(place, batch.lengths[:, None] - 2)
    rows = torch.arange(len(place), device=hidden.device)[:, None]
    logits = model.language.logits(hidden[rows, place])
    each = cross_entropy(logits.flatten(0, 1), batch.ids[rows, place + 1].flatten(), reduction="none")
    return (each * answer.flatten()).sum() / answer.sum()


def _flow_losses(
    model: Alpamayo, context: BatchContext, actions: Tensor, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Squared errors of the flow's velocity, waypoint by waypoint and summed along the path.

    Sums along the path are what speed, heading and position are made of. Both are least where the velocity is the
    conditional mean, so together they weigh slow errors more without changing what is learnt.
    """
    places = flow_places(actions, draws, generator)
    velocity = batched.velocity_field(model, context, draws)(places.x, places.times)
    return flow_errors(velocity - places.velocity)


class FlowPlaces(NamedTuple):
    """Where the velocity of a flow is looked at."""

    #: Noisy actions, float32 [B, draws, 64, 2], and their times [B, draws].
    x: Tensor
    times: Tensor
    #: From the noise to the action: what the velocity should be on average, float32 [B, draws, 64, 2].
    velocity: Tensor


def flow_places(actions: Tensor, draws: int, generator: torch.Generator) -> FlowPlaces:
    """Random places on the straight ways from noise to the actions, float32 [B, 64, 2]."""
    rows = actions.shape[0]
    noise = torch.randn((rows, draws, *actions.shape[1:]), device=actions.device, generator=generator)
    # One time from each part of the interval.
    times = torch.rand((rows, draws), device=actions.device, generator=generator)
    times = (times + torch.arange(draws, device=actions.device)) / draws
    share, target = times[..., None, None], actions[:, None]
    return FlowPlaces((1 - share) * noise + share * target, times, target - noise)


def flow_errors(error: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares of velocity errors [B, draws, 64, 2], waypoint by waypoint and summed along the path."""
    return error.square().mean(), (error.cumsum(dim=2) / _SUM_SCALE).square().mean()


def _token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """What image tokens show, and how far away: logits [B, tokens, classes + 1]."""
    logits = logits.float()
    weight = logits.new_ones(CLASSES)
    weight[int(Pixel.CAR) :] = _RARE_WEIGHT
    presence = presence_of(batch.classes).float()
    classes = binary_cross_entropy_with_logits(logits[..., :-1], presence, pos_weight=weight)
    stands = batch.log_distance >= 0
    # Head and target are of about unit size when the target is a tenth of e^5 metres.
    each = smooth_l1_loss(logits[..., -1], batch.log_distance.float() - 2.5, reduction="none", beta=0.2)
    return 4 * classes + (each * stands).sum() / stands.sum().clamp(min=1)


def _decision_loss(logits: Tensor, decision: Tensor) -> Tensor:
    parts = logits.split(list(DECISION_FIELDS.values()), dim=1)
    return torch.stack([cross_entropy(part, decision[:, i]) for i, part in enumerate(parts)]).mean()


def _geometry_loss(values: Tensor, batch: Batch) -> Tensor:
    each = smooth_l1_loss(values, batch.geometry, reduction="none", beta=0.1)
    return (each * batch.geometry_known).sum() / batch.geometry_known.sum()


def _plan_loss(plan: Tensor, actions: Tensor) -> Tensor:
    summed = (plan - actions).cumsum(dim=1) / _SUM_SCALE
    return smooth_l1_loss(plan, actions, beta=0.2) + smooth_l1_loss(summed, torch.zeros_like(summed), beta=0.2)


def total(parts: Mapping[str, Tensor]) -> Tensor:
    """The weighted sum that is minimised."""
    return torch.stack([WEIGHTS[name] * value for name, value in parts.items()]).sum()
