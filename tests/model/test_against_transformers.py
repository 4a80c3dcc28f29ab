"""Vision tower and language model equal transformers' Qwen3-VL on random architectures, prompts and images."""

import inspect

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.language import causal_mask
from flashdrive_node.model.state_dict import release_slots
from support.small_models import random_model, small_config

# float32 on both sides, different summation order: a few hundred rounding steps of 6e-8.
TOLERANCE = 2e-5

SLOW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def qwen3_vl(model: Alpamayo) -> Qwen3VLForConditionalGeneration:
    """transformers' own module with the weights of ours, moved over under the release's names."""
    raw = {k: v for k, v in model.config.raw_vlm.items() if k != "model_type"}
    raw["text_config"] = raw["text_config"] | {"vocab_size": model.config.tokens.vocab_size, "dtype": "float32"}
    reference = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**raw)).eval().requires_grad_(False)
    ours = dict(model.named_parameters())
    weights = {
        slot.name.removeprefix("vlm."): ours[slot.target].narrow(0, slot.row, slot.shape[0]).view(slot.shape)
        for slot in release_slots(model.config)
        if slot.name.startswith("vlm.")
    }
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not missing
    assert not unexpected
    return reference


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@st.composite
def architectures(draw):
    """Dimensions that differ in everything the modules could mix up."""
    head_dim = draw(st.sampled_from([8, 16, 24]))
    height = draw(st.integers(1, head_dim // 6))
    width = draw(st.integers(1, head_dim // 6))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    depth = draw(st.integers(1, 4))
    layers = draw(st.integers(1, 4))
    levels = draw(st.lists(st.integers(0, depth - 1), unique=True, max_size=min(depth, layers)).map(sorted))
    vision_heads = draw(st.sampled_from([1, 2, 3]))
    return small_config(
        text_hidden=draw(st.sampled_from([24, 40])),
        layers=layers,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        section=[head_dim // 2 - height - width, height, width],
        text_inter=draw(st.sampled_from([32, 56])),
        vision_hidden=vision_heads * draw(st.sampled_from([8, 12])),
        vision_depth=depth,
        vision_heads=vision_heads,
        vision_inter=draw(st.sampled_from([20, 36])),
        deepstack=levels,
        table=draw(st.integers(2, 7)) ** 2,
        expert_heads=kv_heads,
    )


grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4).map(
    lambda pairs: [(2 * h, 2 * w) for h, w in pairs]
)


@SLOW
@given(config=architectures(), grids=grids, seed=st.integers(0, 2**16))
def test_vision_tower(config, grids, seed):
    model = random_model(config, seed)
    reference = qwen3_vl(model).model.visual
    torch.manual_seed(seed)
    pixels = torch.randn(sum(h * w for h, w in grids), config.vision.patch_features)
    found = model.vision(pixels, grids)
    out = reference(pixels, grid_thw=torch.tensor([(1, h, w) for h, w in grids]))
    embeds, deepstack = (out.pooler_output, out.deepstack_features) if hasattr(out, "pooler_output") else out
    assert relative_error(found.embeds, embeds) < TOLERANCE
    assert len(found.deepstack) == len(deepstack) == len(config.vision.deepstack_layers)
    for ours, theirs in zip(found.deepstack, deepstack, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE


@SLOW
@given(config=architectures(), grids=grids, seed=st.integers(0, 2**16), texts=st.integers(1, 5), tail=st.integers(1, 4))
def test_language_model_with_images(config, grids, seed, texts, tail):
    """Prompt with images between texts: cache, hidden states and logits; then more tokens, at once and one by one."""
    model = random_model(config, seed)
    reference = qwen3_vl(model)
    raw = config.raw_vlm
    generator = torch.Generator().manual_seed(seed)

    def text(n: int) -> list[int]:
        return torch.randint(7, config.tokens.vocab_size, (n,), generator=generator).tolist()

    ids: list[int] = text(texts)
    for h, w in grids:
        ids += [raw["vision_start_token_id"], *[raw["image_token_id"]] * (h * w // 4), raw["vision_end_token_id"]]
        ids += text(1)
    ids_tensor = torch.tensor(ids)
    pixels = torch.randn(sum(h * w for h, w in grids), config.vision.patch_features, generator=generator)
    grid_thw = torch.tensor([(1, h, w) for h, w in grids])
    is_image = ids_tensor == raw["image_token_id"]
    inputs = {"input_ids": ids_tensor[None], "pixel_values": pixels, "image_grid_thw": grid_thw}
    if "mm_token_type_ids" in inspect.signature(reference.forward).parameters:
        inputs["mm_token_type_ids"] = is_image.int()[None]
    out = reference(**inputs, use_cache=True)
    rope = {k: v for k, v in inputs.items() if k != "pixel_values"}
    positions, delta = reference.model.get_rope_index(**rope)

    cache = KVCache(config.text, len(ids) + 2 * tail, "cpu", torch.float32)
    features = model.vision(pixels, grids)
    hidden = model.language(ids_tensor, positions[:, 0], cache, features=features, image_index=is_image.nonzero()[:, 0])
    assert relative_error(model.language.logits(hidden), out.logits[0]) < TOLERANCE

    more = torch.tensor(text(tail))
    index = torch.arange(tail) + len(ids) + int(delta)
    expected = []
    for token, at in zip(more, index, strict=True):
        step = reference(
            input_ids=token[None, None], position_ids=at.expand(3, 1, 1), past_key_values=out.past_key_values
        )
        expected.append(step.logits[0])
    at_once = KVCache(config.text, len(ids) + tail, "cpu", torch.float32)
    at_once.copy_prefix(cache, len(ids))
    together = model.language(more, index.expand(3, -1), at_once, causal_mask(len(ids), tail, torch.device("cpu")))
    assert relative_error(model.language.logits(together), torch.cat(expected)) < TOLERANCE
    for i in range(tail):
        one = model.language(more[i : i + 1], index[i].expand(3, 1), cache)
        assert relative_error(model.language.logits(one), expected[i]) < TOLERANCE
    for layer in range(config.text.num_layers):
        theirs = out.past_key_values.layers[layer]
        assert relative_error(cache.keys[layer, :, : cache.used], theirs.keys[0]) < TOLERANCE
        assert relative_error(cache.values[layer, :, : cache.used], theirs.values[0]) < TOLERANCE


def test_several_tokens_on_a_context_need_a_mask():
    config = small_config()
    model = random_model(config, 0)
    cache = KVCache(config.text, 8, "cpu", torch.float32)
    ids = torch.arange(3)
    model.language(ids, ids.expand(3, -1), cache)
    with pytest.raises(ValueError, match="3 tokens on a context of 3 need a mask"):
        model.language(ids, ids.expand(3, -1), cache)
