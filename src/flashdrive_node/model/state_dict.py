"""Where every tensor of a released checkpoint goes in our modules.

The release stores q, k, v and gate, up one by one; ours are fused by rows. Nothing else differs but names, and the
patch embedding, a 3-D convolution over exactly one patch, which is a matrix product with the same elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from flashdrive_node.model.config import ALPAMAYO_R1, AlpamayoConfig, DecoderConfig


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of the release and its place in our modules."""

    #: Name in the release's files.
    name: str
    #: Shape in the release's files.
    shape: tuple[int, ...]
    #: Parameter or buffer of our model that holds it.
    target: str
    #: First row in the target; targets that several tensors share are fused by rows.
    row: int = 0
    #: R1 files hold the normalisation constants and Fourier frequencies, 1.5 files leave them to the code.
    optional: bool = False
    #: Types that the file may have it in, by their names in a header; empty for any floating type of 16 bits or more.
    types: tuple[str, ...] = ()
    #: Other shapes with the same elements in the same order that files are known to have.
    other_shapes: tuple[tuple[int, ...], ...] = ()


def release_slots(config: AlpamayoConfig) -> list[TensorSlot]:
    """Every tensor of a release checkpoint of this architecture, in the order of the modules."""
    return [*_vision(config), *_language(config), *_expert(config)]


def _norm(name: str, size: int, target: str, bias: bool = False) -> list[TensorSlot]:
    slots = [TensorSlot(f"{name}.weight", (size,), f"{target}.weight")]
    return slots + ([TensorSlot(f"{name}.bias", (size,), f"{target}.bias")] if bias else [])


def _linear(name: str, out: int, inp: int, target: str, row: int = 0, bias: bool = False) -> list[TensorSlot]:
    slots = [TensorSlot(f"{name}.weight", (out, inp), f"{target}.weight", row)]
    return slots + ([TensorSlot(f"{name}.bias", (out,), f"{target}.bias", row)] if bias else [])


def decoder_slots(name: str, config: DecoderConfig, target: str) -> list[TensorSlot]:
    """Layers and final norm of a decoder stack; `name` and `target` are what stands in front, up to the dot."""
    hidden, inter, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    slots: list[TensorSlot] = []
    for i in range(config.num_layers):
        src, dst = f"{name}layers.{i}", f"{target}layers.{i}"
        slots += _norm(f"{src}.input_layernorm", hidden, f"{dst}.input_norm")
        slots += _linear(f"{src}.self_attn.q_proj", q, hidden, f"{dst}.qkv")
        slots += _linear(f"{src}.self_attn.k_proj", kv, hidden, f"{dst}.qkv", row=q)
        slots += _linear(f"{src}.self_attn.v_proj", kv, hidden, f"{dst}.qkv", row=q + kv)
        slots += _norm(f"{src}.self_attn.q_norm", config.head_dim, f"{dst}.q_norm")
        slots += _norm(f"{src}.self_attn.k_norm", config.head_dim, f"{dst}.k_norm")
        slots += _linear(f"{src}.self_attn.o_proj", hidden, q, f"{dst}.o_proj")
        slots += _norm(f"{src}.post_attention_layernorm", hidden, f"{dst}.post_norm")
        slots += _linear(f"{src}.mlp.gate_proj", inter, hidden, f"{dst}.gate_up")
        slots += _linear(f"{src}.mlp.up_proj", inter, hidden, f"{dst}.gate_up", row=inter)
        slots += _linear(f"{src}.mlp.down_proj", hidden, inter, f"{dst}.down")
    return slots + _norm(f"{name}norm", hidden, f"{target}norm")


def _vision(config: AlpamayoConfig) -> list[TensorSlot]:
    v, name, target = config.vision, "vlm.model.visual", "vision"
    patch = (v.hidden_size, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    slots = [
        # Checkpoints saved by code that runs the convolution as a matrix product have it flat.
        TensorSlot(
            f"{name}.patch_embed.proj.weight",
            patch,
            f"{target}.patch_embed.weight",
            other_shapes=((patch[0], math.prod(patch[1:])),),
        ),
        TensorSlot(f"{name}.patch_embed.proj.bias", (v.hidden_size,), f"{target}.patch_embed.bias"),
        TensorSlot(
            f"{name}.pos_embed.weight", (v.num_position_embeddings, v.hidden_size), f"{target}.pos_embed.weight"
        ),
    ]
    for i in range(v.depth):
        src, dst = f"{name}.blocks.{i}", f"{target}.blocks.{i}"
        slots += _norm(f"{src}.norm1", v.hidden_size, f"{dst}.norm1", bias=True)
        slots += _linear(f"{src}.attn.qkv", 3 * v.hidden_size, v.hidden_size, f"{dst}.qkv", bias=True)
        slots += _linear(f"{src}.attn.proj", v.hidden_size, v.hidden_size, f"{dst}.proj", bias=True)
        slots += _norm(f"{src}.norm2", v.hidden_size, f"{dst}.norm2", bias=True)
        slots += _linear(f"{src}.mlp.linear_fc1", v.intermediate_size, v.hidden_size, f"{dst}.fc1", bias=True)
        slots += _linear(f"{src}.mlp.linear_fc2", v.hidden_size, v.intermediate_size, f"{dst}.fc2", bias=True)
    mergers = [("merger", "merger", v.hidden_size)]
    mergers += [
        (f"deepstack_merger_list.{j}", f"deepstack_mergers.{j}", v.merged_size) for j in range(len(v.deepstack_layers))
    ]
    for src, dst, norm_size in mergers:
        slots += _norm(f"{name}.{src}.norm", norm_size, f"{target}.{dst}.norm", bias=True)
        slots += _linear(f"{name}.{src}.linear_fc1", v.merged_size, v.merged_size, f"{target}.{dst}.fc1", bias=True)
        slots += _linear(f"{name}.{src}.linear_fc2", v.out_hidden_size, v.merged_size, f"{target}.{dst}.fc2", bias=True)
    return slots


def _language(config: AlpamayoConfig) -> list[TensorSlot]:
    vocab, hidden = config.tokens.vocab_size, config.text.hidden_size
    return [
        TensorSlot("vlm.model.language_model.embed_tokens.weight", (vocab, hidden), "language.embed_tokens.weight"),
        *decoder_slots("vlm.model.language_model.", config.text, "language."),
        TensorSlot("vlm.lm_head.weight", (vocab, hidden), "language.lm_head.weight"),
    ]


def _expert(config: AlpamayoConfig) -> list[TensorSlot]:
    proj, hidden, channels = config.action_in_proj, config.expert.hidden_size, 2
    slots = decoder_slots("expert.", config.expert, "expert.")
    sizes = [(proj.num_fourier_feats // 2) * 2 * (channels + 1), *[proj.hidden_size] * proj.num_enc_layers, hidden]
    target = "expert.action_in_proj"
    for i, (inp, out) in enumerate(pairwise(sizes)):
        # The release's trunk is Linear, SiLU, RMSNorm repeated; SiLU has an index but no tensor.
        slots += _linear(f"action_in_proj.encoder.trunk.{3 * i}", out, inp, f"{target}.linears.{i}", bias=True)
        if i < proj.num_enc_layers:
            slots += _norm(f"action_in_proj.encoder.trunk.{3 * i + 2}", out, f"{target}.norms.{i}")
    slots += _norm("action_in_proj.norm", hidden, f"{target}.out_norm", bias=True)
    slots += _linear("action_out_proj", channels, hidden, "expert.action_out_proj", bias=True)
    if config.model_type == ALPAMAYO_R1:
        half = proj.num_fourier_feats // 2
        encoders = [*(f"sinus.{c}" for c in range(channels)), "timestep_fourier_encoder"]
        slots += [
            TensorSlot(f"action_in_proj.{name}.freqs", (1, half), f"{target}.frequencies", row=i, optional=True)
            for i, name in enumerate(encoders)
        ]
        slots += [
            TensorSlot(f"action_space.{name}", (), "action_space.constants", row=i, optional=True)
            for i, name in enumerate(("accel_mean", "accel_std", "curvature_mean", "curvature_std"))
        ]
    return slots
