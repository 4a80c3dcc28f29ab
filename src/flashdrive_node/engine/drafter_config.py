"""What a drafter is: architecture, what it looks at of a prompt, and its ``config.json``.

Two variants share one network. DFlash looks at the states of the last tokens alone, at positions of its own. A routine
drafter looks at parts of the prompt as well, the ego history above all, at positions that are a choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from flashdrive_node.model.config import AlpamayoConfig, DecoderConfig
from flashdrive_node.model.errors import ConfigError

#: Parts of a prompt that a routine drafter may look at, besides the states of the last tokens. "instruction" is all
#: text behind the ego history but the navigation text; "images" are averages over parts of each image.
Part = Literal["images", "history", "navigation", "instruction"]
PARTS: tuple[Part, ...] = get_args(Part)

#: Rotary positions. local: along the drafter's own sequence, the same in every block. flat: one axis, along the prompt.
#: mrope: the target's three axes.
Rotary = Literal["local", "flat", "mrope"]
ROTARIES: tuple[Rotary, ...] = get_args(Rotary)

#: Names in ``config.json``.
DFLASH, ROUTINE = "DFlashDraftModel", "RoutineDraftModel"


@dataclass(frozen=True)
class DrafterConfig:
    """Architecture of a drafter."""

    decoder: DecoderConfig
    #: Layers of the target whose outputs are the context.
    target_layer_ids: tuple[int, ...]
    #: Tokens of a block: a known one and the guesses.
    block_size: int
    #: States of the last accepted tokens that a proposal looks at.
    context_length: int
    mask_token_id: int
    rotary: Rotary = "local"
    #: In the order of `PARTS`.
    parts: tuple[Part, ...] = ()
    #: Rows and columns that each image is averaged to, for the part "images".
    image_cells: tuple[int, int] = (2, 3)

    @property
    def context_size(self) -> int:
        """Width of one context state: the hidden states of all target layers side by side."""
        return len(self.target_layer_ids) * self.decoder.hidden_size

    @property
    def variant(self) -> str:
        """``routine`` where it looks further than DFlash does."""
        return "routine" if self.parts or self.rotary != "local" else "dflash"


def rotary_sections(rotary: Rotary, target: DecoderConfig) -> tuple[int, int, int]:
    """Rotary pairs of the three axes: the target's, or one axis for all."""
    return target.mrope_section if rotary == "mrope" else (target.head_dim // 2, 0, 0)


def parse_drafter_config(content: dict[str, Any], target: AlpamayoConfig, where: str) -> DrafterConfig:
    """Read ``config.json`` of a drafter; its own keys stand at the top level or under ``dflash_config``.

    Args:
        content: The file.
        target: Configuration of the model that it drafts for.
        where: Name of the file for error messages.

    Raises:
        ConfigError: Lists every missing key, wrong type, unsupported feature and misfit with the target.
    """
    reader = _Reader({**content, **(content.get("dflash_config") or {})})
    hidden, heads = reader.number("hidden_size"), reader.number("num_attention_heads")
    head_dim = reader.number("head_dim", max(hidden // heads, 1))
    rotary, parts, cells = reader.looks()
    decoder = DecoderConfig(
        num_layers=reader.number("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=reader.number("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=reader.number("intermediate_size"),
        rms_norm_eps=reader.real(content, "rms_norm_eps"),
        rope_theta=reader.real({**content, **(content.get("rope_parameters") or {})}, "rope_theta"),
        mrope_section=target.text.mrope_section if rotary == "mrope" else (head_dim // 2, 0, 0),
    )
    config = DrafterConfig(
        decoder=decoder,
        target_layer_ids=reader.layers(target.text.num_layers),
        block_size=reader.number("block_size"),
        context_length=reader.number("context_len", 1),
        mask_token_id=reader.number("mask_token_id"),
        rotary=rotary,
        parts=parts,
        image_cells=cells,
    )
    reader.problems += _misfits(config, target)
    for key, supported in (("hidden_act", "silu"), ("attention_bias", False), ("is_causal", False)):
        if reader.own.get(key, supported) != supported:
            reader.problems.append(f"key {key!r} must be {supported!r}, found {reader.own[key]!r}")
    if odd := sorted(set(content.get("layer_types") or ()) - {"full_attention"}):
        reader.problems.append(f"layer_types must be 'full_attention', found {odd}")
    if reader.problems:
        raise ConfigError(where, reader.problems)
    return config


def _misfits(config: DrafterConfig, target: AlpamayoConfig) -> list[str]:
    decoder, problems = config.decoder, []
    if config.block_size < 2:
        problems.append(f"block_size must be at least 2, found {config.block_size}")
    if decoder.num_heads % decoder.num_kv_heads:
        problems.append(
            f"num_attention_heads {decoder.num_heads} must be a multiple of num_key_value_heads {decoder.num_kv_heads}"
        )
    if decoder.hidden_size != target.text.hidden_size:
        problems.append(f"hidden_size must be the target's, {target.text.hidden_size}, found {decoder.hidden_size}")
    if config.rotary == "mrope" and decoder.head_dim != target.text.head_dim:
        problems.append(f"rotary 'mrope' needs the target's head_dim, {target.text.head_dim}, found {decoder.head_dim}")
    return problems


class _Reader:
    """Takes values out of a file, and collects what is wrong with them."""

    def __init__(self, own: dict[str, Any]):
        self.own = own
        self.problems: list[str] = []

    def number(self, key: str, default: int | None = None) -> int:
        value = self.own.get(key, default)
        if type(value) is not int or value < 1:
            self.problems.append(f"key {key!r} must be a positive int, found {value!r}")
            return 1
        return value

    def real(self, source: dict[str, Any], key: str) -> float:
        value = source.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            self.problems.append(f"key {key!r} must be a positive number, found {value!r}")
            return 1.0
        return float(value)

    def layers(self, count: int) -> tuple[int, ...]:
        ids = self.own.get("target_layer_ids")
        if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
            # Files without it exist; the layers that other code falls back to are not those it was trained with.
            self.problems.append(f"key 'target_layer_ids' must be a list of int, found {ids!r}")
            return (0,)
        if outside := [i for i in ids if not 0 <= i < count]:
            self.problems.append(f"target_layer_ids must be 0 to {count - 1}, found {outside}")
        return tuple(ids)

    def looks(self) -> tuple[Rotary, tuple[Part, ...], tuple[int, int]]:
        """What tells a routine drafter from DFlash: rotary positions, parts, image cells."""
        rotary, parts = self.own.get("rotary"), self.own.get("prompt_parts")
        if self.own.get("architectures") != [ROUTINE]:
            rotary, parts = rotary or "local", parts or []
        if rotary not in ROTARIES:
            self.problems.append(f"key 'rotary' must be one of {', '.join(ROTARIES)}, found {rotary!r}")
        chosen: Rotary = next((name for name in ROTARIES if name == rotary), "local")
        if not isinstance(parts, list) or any(part not in PARTS for part in parts):
            self.problems.append(f"key 'prompt_parts' must be a list out of {', '.join(PARTS)}, found {parts!r}")
            parts = []
        cells = self.own.get("image_cells", [2, 3])
        if not isinstance(cells, list) or len(cells) != 2 or any(type(n) is not int or n < 1 for n in cells):
            self.problems.append(f"key 'image_cells' must be two positive int (rows, columns), found {cells!r}")
            cells = [1, 1]
        return chosen, tuple(part for part in PARTS if part in parts), (cells[0], cells[1])
