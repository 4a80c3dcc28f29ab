"""The action stage in one piece: the flow over the waypoints of all samples, and the paths that come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.engine.flow_schedule import integrate
from flashdrive_node.engine.graphs import Cuts, Graphs
from flashdrive_node.engine.kernels.attention import attend_for
from flashdrive_node.engine.kernels.visibility import up_to, waypoint_visibility
from flashdrive_node.engine.kernels.waypoints import embed_waypoints, project_velocity
from flashdrive_node.engine.read_back import ReadBack
from flashdrive_node.engine.slot_pass import run_at_slots
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.flow_matching import Velocity, guided
from flashdrive_node.model.inference import Context
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.rope import mrope_cos_sin


@dataclass(frozen=True)
class SampledTexts:
    """Where the text of each sample stands in a cache; samples may share one."""

    #: First slot and number of slots of each sample's text.
    spans: tuple[tuple[int, int], ...]
    #: Tokens of each sample's text, the stop token included: its waypoints' positions go on behind.
    lengths: tuple[int, ...]
    #: Slot behind the texts, where the waypoints of several samples may stand.
    end: int


class WaypointContext:
    """What the waypoints of all samples look at in one cache, as numbers on the device."""

    def __init__(self, model: Alpamayo, cache: KVCache, samples: int):
        """Waypoints of `samples` samples; the cache has room for them behind the texts."""
        self.model, self.cache, self.samples = model, cache, samples
        self.waypoints = model.config.action_space.n_waypoints
        # One upload: prefix, first waypoint slot, then per sample the text's first slot and end, and first position.
        self._numbers = torch.zeros(2 + 3 * samples, dtype=torch.int64, device=model.device)

    def place(self, context: Context, texts: SampledTexts) -> None:
        """Say where prompt and texts of a window stand."""
        # A single sample's waypoints go right behind its text: what they see is one stretch of the cache then, which
        # needs no comparison of slots.
        first = sum(texts.spans[0]) if self.samples == 1 else texts.end
        self.cache.require(first + self.samples * self.waypoints)
        spans = [edge for first, count in texts.spans for edge in (first, first + count)]
        positions = [context.prefix + length + context.rope_delta for length in texts.lengths]
        numbers = torch.tensor([context.prefix, first, *spans, *positions])
        self._numbers.copy_(numbers, non_blocking=True)

    def velocity(self, behind: Callable[[int, Tensor], None] | None = None) -> Velocity:
        """The expert on this context: velocity on [samples, waypoints, 2], told of time by `ActionInProj.time_part`.

        Args:
            behind: Called behind every layer, see `run_at_slots`.
        """
        model, expert, n, w = self.model, self.model.expert, self.samples, self.waypoints
        prefix, first, rest = self._numbers[:1], self._numbers[1:2], self._numbers[2:]
        order = torch.arange(w, device=model.device)
        positions = (rest[2 * n :, None] + order).flatten().expand(3, -1)
        rotation = mrope_cos_sin(positions, model.config.expert, model.dtype)
        slots = first + torch.arange(n * w, device=model.device)
        causal = not model.config.expert_non_causal
        if n == 1:
            visible = up_to(first + (order + 1 if causal else torch.full_like(order, w)))
        else:
            visible = waypoint_visibility(prefix, rest[: 2 * n].view(n, 2), first, w, causal)

        def velocity(x: Tensor, time_part: Tensor) -> Tensor:
            y = embed_waypoints(x.flatten(0, 1), time_part[None], expert.action_in_proj, model.dtype)
            y = run_at_slots(
                expert.layers,
                expert.norm,
                y,
                rotation,
                slots,
                self.cache,
                lambda q, keys, values, reader: attend_for(reader, q, keys, values, visible),
                tap=behind,
            )
            return project_velocity(y, expert.action_out_proj).view_as(x)

        return velocity


class FlowPass:
    """Noise to paths: every evaluation of a schedule and the unicycle, as one graph."""

    def __init__(self, model: Alpamayo, samples: int, table: Tensor, graphs: Graphs | None = None):
        """`table` is that of a `FlowSchedule`."""
        self.model = model
        self.graphs = graphs or Graphs(model.device, enabled=False)
        device, waypoints = model.device, model.config.action_space.n_waypoints
        self._table = table
        self._times = model.expert.action_in_proj.time_part(table[:, 0])  # [evaluations, hidden]
        self._noise = torch.zeros(samples, waypoints, 2, device=device)
        # Initial speed, height and guidance weight.
        self._numbers = torch.zeros(3, device=device)
        # Per sample: position, yaw, speed, acceleration and curvature of each waypoint, and the error estimate.
        self._result = torch.zeros(samples, waypoints * 7 + 1, device=device)
        self._read_back = ReadBack(self._result)

    def start(
        self,
        context: WaypointContext,
        noise: Tensor,
        initial_speed: float,
        z: float,
        without_navigation: WaypointContext | None = None,
        guidance_weight: float = 1.0,
    ) -> None:
        """Begin, behind what the device has been told to do so far.

        Args:
            context: Placed.
            noise: float32 [samples, waypoints, 2], scaled.
            initial_speed: At t0, m/s.
            z: Height at t0, metres; waypoints keep it.
            without_navigation: Placed; guidance is off without it.
            guidance_weight: Of the velocity with navigation.
        """
        self._noise.copy_(noise)
        self._numbers.copy_(torch.tensor([initial_speed, z, guidance_weight]), non_blocking=True)
        self.graphs.run((self, context, without_navigation), lambda: self._integrate(context, without_navigation))
        self._read_back.start(self._result)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait for the paths.

        Returns:
            On the host: position, yaw, speed, acceleration and curvature of each waypoint [samples, waypoints, 7], and
            the error estimate of `Flowed`, [samples].
        """
        result = self._read_back.wait().clone()
        return result[:, :-1].unflatten(1, (-1, 7)), result[:, -1]

    def _integrate(self, context: WaypointContext, without_navigation: WaypointContext | None) -> None:
        speed, z, weight = self._numbers.unbind()
        passes = len(self._table) * (1 if without_navigation is None else 2)
        cuts = Cuts(self.graphs, len(self.model.expert.layers), passes)
        velocity = context.velocity(cuts.behind)
        if without_navigation is not None:
            velocity = guided(velocity, without_navigation.velocity(cuts.behind), weight)
        flowed = integrate(velocity, self._noise, self._table, self._times)
        path = self.model.action_space.to_path(flowed.action, speed.expand(len(self._noise)), z)
        columns = (path.yaw, path.speed, path.acceleration, path.curvature)
        numbers = torch.cat((path.xyz, *(column[..., None] for column in columns)), dim=-1)
        self._result.copy_(torch.cat((numbers.flatten(1), flowed.error[:, None]), dim=1))
