"""The second context of navigation guidance: the same window and the same texts, without the navigation text."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding

from flashdrive_node.engine.flow_pass import SampledTexts, WaypointContext
from flashdrive_node.engine.kernels.attention import attend_for
from flashdrive_node.engine.kernels.visibility import up_to
from flashdrive_node.engine.slot_pass import run_at_slots
from flashdrive_node.engine.speculative import TextDecoder
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.inference import Context, Generated
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.prompt import Prompt, without_navigation
from flashdrive_node.model.rope import mrope_cos_sin


class UnguidedContext:
    """A cache of its own for that context, allocated once.

    Everything in front of the navigation text is the same in both, so those slots are copied and only the prompt's tail
    and the texts are computed.
    """

    def __init__(self, model: Alpamayo, decoder: TextDecoder, samples: int):
        """`decoder` is the one whose texts will be repeated."""
        self.model = model
        self.cache = KVCache(model.config.text, decoder.cache.slots, model.device, model.dtype)
        self._decoder = TextDecoder(
            model,
            self.cache,
            decoder.rows,
            decoder.settings,
            decoder.rule,
            None,
            decoder.graphs,
            stretch=decoder.stretch,
        )
        self._waypoints = WaypointContext(model, self.cache, samples)
        self._samples = samples

    def follow(self, prompt: Prompt, context: Context, text: Generated) -> WaypointContext:
        """Bring the context to a window.

        Args:
            prompt: With navigation text and history.
            context: That prompt in its own cache.
            text: The texts generated from it, a row each.
        """
        assert prompt.nav_span is not None
        bare, shared, model = without_navigation(prompt), prompt.nav_span[0], self.model
        self.cache.copy_prefix(context.cache, shared)
        language, device = model.language, model.device
        slots = torch.arange(shared, len(bare.ids), device=device)
        x = embedding(bare.ids[shared:].to(device, non_blocking=True), language.embed_tokens.weight)
        positions = bare.positions[:, shared:].to(device, non_blocking=True)
        visible = up_to(slots + 1)
        run_at_slots(
            language.layers,
            language.norm,
            x,
            mrope_cos_sin(positions, language.config, x.dtype),
            slots,
            self.cache,
            lambda q, keys, values, reader: attend_for(reader, q, keys, values, visible),
        )
        second = Context(self.cache, len(bare.ids), bare.rope_delta)
        self._decoder.repeat(second, text)
        first, end = self._decoder.stretches(second)
        # All tokens count here, also the last of a text that was cut, as in the reference.
        copies = self._samples // len(first)
        spans = tuple(zip(first, text.lengths, strict=True)) * copies
        self._waypoints.place(second, SampledTexts(spans, text.lengths * copies, end))
        return self._waypoints
