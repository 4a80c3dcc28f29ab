"""Windows of made-up frames for streams: features are drawn per camera and stamp, so a frame is always the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashdrive_node.engine.stream import Stream
from flashdrive_node.engine.window_plan import WindowPlan
from flashdrive_node.model import inference
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.config_parser import parse_config
from flashdrive_node.model.inference import Context
from flashdrive_node.model.prompt import Prompt, driving_prompt, fuse_history
from flashdrive_node.model.tokenizer import AlpamayoTokenizer, load_tokenizer
from flashdrive_node.model.vision import VisionFeatures
from support import oracle_small
from support.small_models import random_model


@lru_cache
def stream_config(labels: bool = True, levels: int = 2, **text: Any) -> AlpamayoConfig:
    """The recorded model's configuration and vocabulary with narrower layers.

    Args:
        labels: Whether cameras are named and frames numbered, as in 1.5; R1 has the bare images.
        levels: Levels of DeepStack features.
        text: Changes to the language model.
    """
    base = oracle_small.config()
    model, vlm = copy.deepcopy(base.raw), copy.deepcopy(base.raw_vlm)
    model |= {"include_camera_ids": labels, "include_frame_nums": labels}
    vlm["text_config"] |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, **text}
    model["expert_cfg"] |= {k: text[k] for k in ("num_key_value_heads",) if k in text and k in model["expert_cfg"]}
    vlm["vision_config"] |= {
        "out_hidden_size": vlm["text_config"]["hidden_size"],
        "depth": 2,
        "deepstack_visual_indexes": list(range(levels)),
    }
    return parse_config(model, vlm, "stream")


#: Models of tests, by number: layers, heads, DeepStack levels and the prompt's labels differ.
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"labels": False, "num_hidden_layers": 3, "num_attention_heads": 6},
    {"levels": 1, "num_attention_heads": 2, "hidden_size": 48},
    {"levels": 0, "num_hidden_layers": 1, "intermediate_size": 20},
)


@lru_cache
def tokenizer() -> AlpamayoTokenizer:
    return load_tokenizer(oracle_small.TOKENIZER, oracle_small.config())


@lru_cache(maxsize=8)
def stream_model(number: int, dtype: torch.dtype = torch.float32) -> Alpamayo:
    """A model with random weights and one of `SHAPES`."""
    return random_model(stream_config(**SHAPES[number % len(SHAPES)]), number, dtype)


NAV = [None, "Turn left in 30m", "Turn right onto a long street in 120m, then keep right"]


@dataclass(frozen=True)
class Window:
    """What a stream is shown."""

    #: Stamps of the frames per camera index.
    stamps: dict[int, tuple[int, ...]]
    nav_text: str | None = None
    #: Draws the ego history.
    history: int = 0

    @property
    def rows(self) -> list[tuple[int, ...]]:
        return [self.stamps[camera] for camera in sorted(self.stamps)]

    def prompt(self, model: Alpamayo) -> Prompt:
        cameras = sorted(self.stamps)
        frames = len(self.rows[0])
        # Cameras differ in size: 4 x 4 and 4 x 6 patches.
        grids = [(4, 4 + 2 * (camera % 2)) for camera in cameras for _ in range(frames)]
        return driving_prompt(tokenizer(), model.config, cameras, frames, grids, self.nav_text)

    def ids(self, model: Alpamayo, prompt: Prompt) -> Tensor:
        generator = torch.Generator().manual_seed(self.history)
        tokens = model.config.tokens
        history = torch.randint(0, 500, (model.config.tokens_per_history_traj,), generator=generator)
        return fuse_history(prompt, history + tokens.history_token_start).ids

    def without(self, camera: int) -> Window:
        """The window with a camera lost."""
        return replace(self, stamps={c: s for c, s in self.stamps.items() if c != camera})


def frame_features(model: Alpamayo, camera: int, stamp: int, tokens: int) -> VisionFeatures:
    generator = torch.Generator().manual_seed(camera * 1_000_003 + stamp % 1_000_000)
    levels = len(model.vision.deepstack_mergers)
    drawn = torch.randn(1 + levels, tokens, model.config.text.hidden_size, generator=generator).to(model.dtype)
    return VisionFeatures(drawn[0], list(drawn[1:]))


def features_of(model: Alpamayo, window: Window, prompt: Prompt, images: Sequence[int]) -> VisionFeatures | None:
    """What the vision tower would give for some images of a window."""
    parts = [
        frame_features(model, image.camera_index, window.stamps[image.camera_index][image.frame], image.count)
        for image in (prompt.images[i] for i in images)
    ]
    if not parts:
        return None
    levels = range(len(parts[0].deepstack))
    return VisionFeatures(
        torch.cat([p.embeds for p in parts]), [torch.cat([p.deepstack[j] for p in parts]) for j in levels]
    )


def tick(stream: Stream, window: Window) -> tuple[Context, Tensor, WindowPlan]:
    """Show a window to a stream."""
    prompt = window.prompt(stream.model)
    plan = stream.plan(prompt, window.rows)
    features = features_of(stream.model, window, prompt, plan.encode)
    context, logits = stream.prefill(plan, window.ids(stream.model, prompt), window.rows, features)
    return context, logits.clone(), plan  # the next window writes to the same buffer


def state(context: Context) -> tuple[Tensor, Tensor]:
    """Keys and values of the prompt."""
    end = context.prefix
    return context.cache.keys[:, :, :end].clone(), context.cache.values[:, :, :end].clone()


def from_scratch(stream: Stream, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, keys and values of the model's plain path."""
    model = stream.model
    prompt = window.prompt(model)
    features = features_of(model, window, prompt, range(len(prompt.images)))
    cache = inference.new_cache(model, len(prompt.ids), 1, 1)
    ids = window.ids(model, prompt)
    context, logits = inference.prefill(
        model, ids, prompt.positions, prompt.rope_delta, cache, features, prompt.image_index
    )
    return logits, *state(context)


def drive(seed: int, ticks: int, cameras: list[int] | None = None, frames: int = 4) -> Iterator[Window | None]:
    """Windows of a drive with everything that happens to streams; None is a reset."""
    draw = random.Random(seed)
    cameras = cameras or sorted(draw.sample(range(7), draw.choice([1, 2, 3, 4, 7])))
    stamps = {camera: tuple(100 * (i + 1) + camera for i in range(frames)) for camera in cameras}
    window = Window(stamps)
    for k in range(ticks):
        yield window
        if draw.random() < 0.1:
            yield None
        nav = draw.choice(NAV) if draw.random() < 0.3 else window.nav_text
        stamps = {}
        event = draw.random()
        for camera, old in window.stamps.items():
            # Mostly one frame, after missed ticks more, each camera on its own now and then; or none, or a gap.
            new = draw.choice([1, 1, 1, 2, 3, 4]) if event < 0.7 else draw.choice([0, 1, 2]) if event < 0.9 else 0
            last = old[-1] + (5000 if event > 0.95 else 0)
            kept = () if event > 0.95 else old
            new = frames if event > 0.95 else new
            stamps[camera] = (*kept, *(last + 100 * (i + 1) for i in range(new)))[-frames:]
        if draw.random() < 0.08 and len(stamps) > 1:
            stamps.pop(draw.choice(sorted(stamps)))
        elif draw.random() < 0.08 and (absent := set(cameras) - set(stamps)):
            camera = min(absent)
            stamps[camera] = tuple(next(iter(stamps.values()))[i] + camera for i in range(frames))
        window = Window(stamps, nav, k + 1)
