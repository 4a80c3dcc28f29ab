"""Where a drafter looks: the share of its attention on each part of what it is shown."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.drafter_config import PARTS
from flashdrive_node.training.draft_replay import DraftingTarget
from flashdrive_node.training.drafter_loss import anchors, cut
from flashdrive_node.training.prompt_views import views_of
from flashdrive_node.training.text_records import TextRecorder, TextRecords

#: Parts of a prompt, then the states of the last tokens, then the block itself.
LOOKED_AT = (*PARTS, "last states", "block")
#: Blocks that are looked at together.
_BATCH = 128


@torch.no_grad()
def attention_shares(
    drafter: Drafter, recorder: TextRecorder, records: TextRecords, blocks: int = 512, seed: int = 0
) -> dict[str, float]:
    """Mean over layers, heads and guesses of some blocks; sums to one.

    Args:
        drafter: Of the recorder's target.
        recorder: That wrote the records.
        records: Texts.
        blocks: How many, drawn at random.
        seed: Of what is drawn.
    """
    target, config = DraftingTarget.of(recorder), drafter.config
    places = anchors(records)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:blocks]
    views = views_of(records, recorder.prompt, config, target.room)
    sums = torch.zeros(len(LOOKED_AT), dtype=torch.float64)
    for chosen in places[order.to(places.device)].split(_BATCH):
        some = cut(records, chosen, config.block_size, config.context_length, views)
        memory = None if some.view is None else drafter.read(some.view).rows(some.prompt)
        weights: list[Tensor] = []
        known = embedding(some.known, target.language.embed_tokens.weight)
        drafter(known, some.context, memory, some.place, weights)
        # Of the guesses alone: the known token's outputs are not used.
        seen = torch.stack(weights).mean(dim=(0, 2))[:, 1:].sum(dim=1).double()
        kinds = torch.empty(len(chosen), 0, dtype=torch.int64) if some.view is None else some.view.kinds[some.prompt]
        own = torch.tensor([len(PARTS)] * config.context_length + [len(PARTS) + 1] * config.block_size)
        kind = torch.cat((kinds.to(seen.device), own.to(seen.device).expand(len(chosen), -1)), dim=1)
        # Hidden slots have no weight.
        sums += torch.bincount(kind.clamp(min=0).flatten(), weights=seen.flatten(), minlength=len(LOOKED_AT)).cpu()
    return dict(zip(LOOKED_AT, (sums / sums.sum()).tolist(), strict=True))
