"""Run recorded cases through our networks and compare every recorded tensor.

Integers (ids, positions, masks, pixels, tokens) must be identical. Other tensors are compared by their largest
difference relative to the largest recorded value; positions in metres by their largest absolute difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.evaluation.recording import Case, script_tensor
from flashdrive_node.model import inference
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.model.images import preprocess
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.prompt import (
    Prompt,
    driving_prompt,
    fuse_history,
    question_prompt,
    without_navigation,
)
from flashdrive_node.model.tokenizer import extract_text

#: Stages in the order of the table: name, pattern of the tensors, bound (None: identical; "m": absolute, in metres).
#: Float bounds hold for float32. Features, keys, values, logits: 1e-4. The expert's own values are looser than the
#: action that comes of them: its Fourier features of up to 100 Hz amplify a rounding of x by hundreds.
STAGES: tuple[tuple[str, str, float | None], ...] = (
    ("prompt", r"input_ids_prompt|attention_mask|image_grid_thw", None),
    ("history", r"gen\.input_ids_fused", None),
    ("positions", r"lm\.\d+\.position_ids|gen\.rope_deltas|flow\.\d+\.(position_ids|attention_mask\.attend)", None),
    ("pixels", r"pixel_values_u8\..*", None),
    ("vision", r"vision\..*", 1e-4),
    ("language", r"lm\.\d+\.(layer_out|k_pre_rope|v_proj|final_hidden_last).*", 1e-4),
    ("cache", r"cache(_unguided)?\.[kv]\.\d+", 1e-4),
    ("logits", r"gen\.logits_masked", 1e-4),
    ("tokens", r"gen\.sequences(_raw)?", None),
    ("flow", r"flow\.\d+\.(x|t|in_proj|layer_out\.\d+|expert_out|v)", 5e-3),
    ("action", r"action", 1e-3),
    ("speed", r"v0", 1e-4),
    ("path", r"pred_xyz|pred_rot", 1e-4),
)


@dataclass(frozen=True)
class StageResult:
    """Comparison of one stage of one case."""

    stage: str
    #: Largest error over the stage's tensors; 0 for identical integers, infinite where shapes or places differ.
    error: float
    bound: float | None
    #: Tensor with the largest error.
    worst: str
    tensors: int

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= (self.bound or 0.0)


@dataclass(frozen=True)
class CaseResult:
    """What one case gave."""

    case: Case
    found: dict[str, Tensor]
    text: dict[str, list[str]]
    stages: tuple[StageResult, ...]

    @property
    def text_equal(self) -> bool:
        """Whether every recorded text came out; True where none was recorded."""
        expected = self.case.expected_text
        return expected is None or all(self.text.get(name) == texts for name, texts in expected.items())

    def passed(self, exact_only: bool = False) -> bool:
        """Whether texts and every stage are within bounds; `exact_only` looks at what no precision may change."""
        exact = ("prompt", "history", "pixels")
        stages = [s for s in self.stages if not exact_only or s.stage in exact]
        return all(s.passed for s in stages) and (exact_only or self.text_equal)


def run_case(loaded: LoadedModel, case: Case) -> CaseResult:
    """Run one case and compare it with what was recorded."""
    found, text = _Run(loaded, case).run()
    if case.expected is not None:
        found = {name: tensor for name, tensor in found.items() if name in case.expected}
    return CaseResult(case, found, text, tuple(compare(found, case.expected)) if case.expected is not None else ())


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[StageResult]:
    """Errors by stage; every recorded tensor belongs to one, and one that we do not have is an infinite error."""
    results = []
    left = set(expected)
    for stage, pattern, bound in STAGES:
        names = sorted(n for n in left if re.fullmatch(pattern, n))
        left -= set(names)
        if names:
            errors = {n: error(found.get(n), expected[n], absolute=stage == "path") for n in names}
            worst = max(names, key=lambda n: errors[n])
            results.append(StageResult(stage, errors[worst], bound, worst, len(names)))
    if left:
        results.append(StageResult("unknown", float("inf"), None, sorted(left)[0], len(left)))
    return results


def error(found: Tensor | None, expected: Tensor, absolute: bool = False) -> float:
    """Largest difference, relative to the largest finite expected value unless `absolute`; infinities must agree."""
    if found is None or found.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found.to(expected.dtype), expected) else float("inf")
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    a, b = found[finite].double(), expected[finite].double()
    if not b.numel():
        return 0.0
    largest = float((a - b).abs().max())
    return largest if absolute else largest / max(float(b.abs().max()), 1e-30)


class _Run:
    """One case on one model: the stages with every intermediate value kept."""

    def __init__(self, loaded: LoadedModel, case: Case):
        self.model, self.tokenizer, self.case = loaded.model, loaded.tokenizer, case
        self.config, self.device = loaded.model.config, loaded.model.device
        self.out: dict[str, Tensor] = {}
        self.calls = 0  # language-model calls so far
        self.steps = 0  # expert calls so far
        self.logits: list[Tensor] = []

    def keep(self, name: str, value: Tensor) -> None:
        value = value.detach().cpu()
        kind = (
            torch.int32 if value.dtype == torch.int64 else torch.float32 if value.is_floating_point() else value.dtype
        )
        self.out[name] = value.to(kind).clone().contiguous()

    @torch.inference_mode()
    def run(self) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
        case, model = self.case, self.model
        pixels, grids = preprocess(list(case.frames), self.config, self.device)
        prompt = self.prompt(grids)
        self.keep_pixels(pixels, grids)
        self.keep("input_ids_prompt", prompt.ids[None])
        self.keep("attention_mask", torch.ones_like(prompt.ids)[None])
        self.keep("image_grid_thw", torch.tensor([(1, *g) for g in grids]))
        fused = self.fuse(prompt)
        self.keep("gen.input_ids_fused", fused.ids[None])
        self.keep("gen.rope_deltas", torch.full((case.samples, 1), fused.rope_delta))

        features = model.vision(pixels, grids, observe=self.observe_vision(grids[0]))
        self.keep("vision.image_embeds", features.embeds)
        first_image = grids[0][0] * grids[0][1] // self.config.vision.spatial_merge_size**2
        for j, level in enumerate(features.deepstack):
            self.keep(f"vision.deepstack.{j}.image0", level[:first_image])

        cache = inference.new_cache(model, len(fused.ids), case.samples, case.sampling.max_length)
        context, logits = inference.prefill(
            model,
            fused.ids.to(self.device),
            fused.positions.to(self.device),
            fused.rope_delta,
            cache,
            features,
            fused.image_index.to(self.device),
            observe=self.observe_prefill,
        )
        self.keep("lm.0.position_ids", fused.positions[:, None].expand(-1, case.samples, -1))
        self.calls = 1
        tokens = self.tokenizer
        rule = inference.StopRule(
            stop=None if case.question else self.config.tokens.future_start,
            end_of_turn=tokens.id("im_end"),
            pad=tokens.id("endoftext"),
            forbidden=None
            if case.question
            else (self.config.tokens.traj_token_start, self.config.tokens.traj_vocab_size),
        )
        script = None if case.script is None else script_tensor(case.script, rule.pad, self.device)
        text = inference.decode(
            model, context, logits, case.samples, case.sampling, rule, script=script, observe=self.observe_decode
        )
        self.keep("gen.logits_masked", torch.stack(self.logits))
        self.keep_sequences(fused, text)
        self.keep_cache("cache", context, case.samples)
        if not case.question:
            self.drive(fused, context, text)
        rows = text.rows()
        # The reference takes texts out of whole sequences for a drive, prompt included, and of the answer alone else.
        prefix = [] if case.question else fused.ids.tolist()
        extracted = [extract_text(self.tokenizer, [*prefix, *row]) for row in rows]
        return self.out, {
            "cot": [e["cot"] for e in extracted],
            "meta_action": [e["meta_action"] for e in extracted],
            "answer": [e["answer"] for e in extracted],
        }

    def prompt(self, grids: list[tuple[int, int]]) -> Prompt:
        case = self.case
        frames = case.frames.shape[1]
        if case.question:
            return question_prompt(self.tokenizer, self.config, case.camera_indices, frames, grids, case.question)
        return driving_prompt(self.tokenizer, self.config, case.camera_indices, frames, grids, case.nav_text)

    def fuse(self, prompt: Prompt) -> Prompt:
        if self.case.question:
            return prompt
        return fuse_history(prompt, encode_history(self.case.history_xyz, self.case.history_rot, self.config))

    def drive(self, prompt: Prompt, context: inference.Context, text: inference.Generated) -> None:
        case, model = self.case, self.model
        stride = 2 if case.guided else 1
        velocity = inference.velocity_field(model, context, text, self.observe_flow(context, 0, stride))
        without = None
        if case.guided:
            bare = without_navigation(prompt)
            assert prompt.nav_span is not None
            second, hidden = inference.prefill_without_navigation(
                model,
                context,
                bare.ids.to(self.device),
                bare.positions.to(self.device),
                bare.rope_delta,
                prompt.nav_span[0],
                case.samples,
            )
            self.keep(f"lm.{self.calls}.position_ids", bare.positions[:, None])
            self.keep(f"lm.{self.calls}.final_hidden_last", hidden)
            # The reference appends the padding behind the stop token as well; it is masked, but recorded.
            padded = self.pad_behind_stop(text)
            columns = padded.tokens.shape[1]
            hidden = inference.repeat_text(model, second, padded, columns)
            positions = torch.arange(columns) + second.prefix + second.rope_delta
            self.keep(f"lm.{self.calls + 1}.position_ids", positions.expand(3, case.samples, -1))
            self.keep(f"lm.{self.calls + 1}.final_hidden_last", hidden[-1])
            self.keep_cache("cache_unguided", second, case.samples)
            without = inference.velocity_field(model, second, text, self.observe_flow(second, 1, stride))
        v0 = model.action_space.initial_speed(case.history_xyz, case.history_rot)
        action, path = inference.act(
            model,
            velocity,
            case.noise.to(self.device),
            v0.to(self.device),
            float(case.history_xyz[-1, 2]),
            case.flow_steps,
            without,
            case.guidance_weight,
        )
        self.keep("action", action)
        self.keep("v0", v0.expand(case.samples))
        self.keep("pred_xyz", path.xyz[None, None])
        self.keep("pred_rot", path.rot[None, None])

    def pad_behind_stop(self, text: inference.Generated) -> inference.Generated:
        tokens = text.tokens.clone()
        for row, (length, stopped) in enumerate(zip(text.lengths, text.stopped, strict=True)):
            if stopped:
                tokens[row, length:] = self.tokenizer.id("endoftext")
        return inference.Generated(tokens, text.lengths, text.stopped)

    def keep_pixels(self, pixels: Tensor, grids: list[tuple[int, int]]) -> None:
        counts = [h * w for h, w in grids]
        levels = (pixels * 127.5 + 127.5).round().to(torch.uint8).split(counts)
        for i in (0, len(levels) - 1):
            self.keep(f"pixel_values_u8.image{i}", levels[i])

    def keep_sequences(self, prompt: Prompt, text: inference.Generated) -> None:
        ids = prompt.ids[None].expand(self.case.samples, -1)
        self.keep("gen.sequences_raw", torch.cat((ids, text.tokens.cpu()), dim=1))
        if not self.case.question:
            self.keep("gen.sequences", torch.cat((ids, self.pad_behind_stop(text).tokens.cpu()), dim=1))

    def keep_cache(self, name: str, context: inference.Context, rows: int) -> None:
        """The cache as one row per sample, each with the prefix and its own tokens, as the reference holds it."""
        for kind, tensor in (("k", context.cache.keys), ("v", context.cache.values)):
            for i in range(self.config.text.num_layers):
                used = tensor[i, :, : context.cache.used]  # [kv_heads, slots, head_dim]
                own = used[:, context.prefix :].unflatten(1, (-1, rows)).permute(2, 0, 1, 3)
                prefix = used[None, :, : context.prefix].expand(rows, -1, -1, -1)
                self.keep(f"{name}.{kind}.{i}", torch.cat((prefix, own), dim=2))

    def observe_vision(self, grid: tuple[int, int]) -> Callable[[str, Tensor], None]:
        return lambda name, value: self.keep(f"vision.{name}.image0", value[: grid[0] * grid[1]])

    def observe_prefill(self, name: str, value: Tensor) -> None:
        # The reference runs the prompt once per sample; we run it once.
        if name == "final_hidden_last":
            value = value[0]
        elif name.startswith("v_proj"):
            value = value.flatten(1)
        elif name.startswith("k_pre_rope"):
            value = value.transpose(0, 1)
        self.keep(f"lm.0.{name}", value.expand(self.case.samples, *value.shape))

    def observe_decode(self, name: str, value: Tensor) -> None:
        if name == "logits_masked":
            self.logits.append(value.detach().cpu())
        elif name == "position":
            self.keep(f"lm.{self.calls}.position_ids", value[..., None])
        else:
            self.keep(f"lm.{self.calls}.{name}", value)
            self.calls += 1

    def observe_flow(self, context: inference.Context, first: int, stride: int) -> Callable[[str, Tensor], None]:
        """Names the values of this context's expert calls: step s of the flow is recorded as s * stride + first."""
        rows, waypoints = self.case.samples, self.config.action_space.n_waypoints
        step = first

        def observe(name: str, value: Tensor) -> None:
            nonlocal step
            if name == "position":
                for s in (0, 1):
                    if s % stride == first or stride == 1:
                        self.keep(f"flow.{s}.position_ids", value.reshape(3, rows, waypoints))
            elif name == "attend":
                for s in (0, 1):
                    if s % stride == first or stride == 1:
                        self.keep(f"flow.{s}.attention_mask.attend", self.attend_rows(value, context))
            elif name == "t":
                self.keep(f"flow.{step}.t", value.reshape(1, 1, 1).expand(rows, 1, 1))
            else:
                self.keep(f"flow.{step}.{name}", value if value.ndim == 3 else value.unflatten(0, (rows, waypoints)))
            if name == "v":
                step += stride

        return observe

    def attend_rows(self, mask: Tensor, context: inference.Context) -> Tensor:
        """What each row's waypoints attend to, in the reference's layout: [rows, prefix + own text + waypoints]."""
        rows, waypoints, used = self.case.samples, self.config.action_space.n_waypoints, context.cache.used
        out = []
        for row in range(rows):
            line = mask[row * waypoints]
            own = line[context.prefix + row : used : rows]
            first = used + row * waypoints
            out.append(torch.cat((line[: context.prefix], own, line[first : first + waypoints])))
        return torch.stack(out)
