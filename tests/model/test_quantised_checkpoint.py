"""Checkpoints of 4-bit layers: written, found in their files, read back, and refused where something is wrong."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.errors import CheckpointError, InputError
from flashdrive_node.model.footprint import PRECISIONS, weight_bytes
from flashdrive_node.model.fp8 import Fp8Linear
from flashdrive_node.model.int4_linear import Int4Linear
from flashdrive_node.model.int8 import Int8Linear
from flashdrive_node.model.linear import QuantisedLinear, SideBySide
from flashdrive_node.model.loading import LoadedModel, load_alpamayo
from flashdrive_node.model.paro_layouts import read_generic
from flashdrive_node.model.paroquant import ALWAYS, NEVER, ParoLinear
from flashdrive_node.model.precision import PRESETS, StagePrecision
from flashdrive_node.model.quantised_writer import save_quantised
from flashdrive_node.model.state_dict import release_slots
from support.checkpoints import edit_json
from support.quantised import NARROW, four_bit, plain_model, quantised_checkpoint

FIXTURE = Path(__file__).parent.parent / "data" / "paroquant_layer.safetensors"
Q_PROJ = "vlm.model.language_model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def plain(tokenizer_files: Path) -> Alpamayo:
    return plain_model(tokenizer_files, NARROW)


@pytest.fixture(scope="module")
def checkpoint(plain: Alpamayo, tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised_checkpoint(plain, tokenizer_files, tmp_path_factory.mktemp("quantised") / "checkpoint")


def load(directory: Path, precision: StagePrecision | None = None) -> LoadedModel:
    return load_alpamayo(directory, dtype=torch.float32, precision=precision, hash_files=False)


def test_layer_packed_by_the_public_package() -> None:
    tensors = load_file(FIXTURE)
    stored = {name.removeprefix("layer."): t for name, t in tensors.items() if name.startswith("layer.")}
    found = ParoLinear(read_generic(stored)).dequantised()
    torch.testing.assert_close(found, tensors["pseudo_weight"], atol=1e-6, rtol=0)


def test_what_is_written_is_read(plain: Alpamayo, checkpoint: Path) -> None:
    loaded = load(checkpoint)
    assert loaded.precision == PRESETS["w4a8"]
    layers = four_bit(plain)
    for name, weight in layers.items():
        layer = loaded.model.get_submodule(name)
        assert isinstance(layer, ParoLinear), name
        assert layer.int8_from == ALWAYS
        assert torch.equal(layer.dequantised(), ParoLinear(weight).dequantised())
    assert isinstance(loaded.model.language.lm_head, Int8Linear)
    assert isinstance(loaded.model.vision.blocks[0].fc1, Fp8Linear)
    assert isinstance(loaded.model.expert.layers[0].qkv, Fp8Linear)
    assert isinstance(loaded.model.language.layers[0].o_proj, torch.nn.Linear)
    assert loaded.model.dtype == torch.float32
    assert not any(tensor.is_meta for tensor in [*loaded.model.parameters(), *loaded.model.buffers()])


def test_stages_choose_what_the_layers_do(checkpoint: Path) -> None:
    stages = StagePrecision(prefill="w4a8", decode="w4a16")
    model = load(checkpoint, stages).model
    layer = model.language.layers[0].qkv
    assert isinstance(layer, ParoLinear)
    assert layer.int8_from == 65
    assert isinstance(model.language.lm_head, torch.nn.Linear)
    layer = load(checkpoint, PRESETS["w4a16"]).model.language.layers[0].qkv
    assert isinstance(layer, ParoLinear)
    assert layer.int8_from == NEVER


def test_less_is_kept_than_of_a_plain_checkpoint(plain: Alpamayo, checkpoint: Path) -> None:
    model = load(checkpoint).model
    for name, layer in model.named_modules():
        if isinstance(layer, ParoLinear):
            dense = plain.get_submodule(name).weight.numel() * 2
            assert sum(t.nbytes for t in layer.packed) < 0.3 * dense, name
    sizes = {precision.name: weight_bytes(release_slots(plain.config), precision) for precision in PRECISIONS}
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    constants = model.action_space.constants.nbytes + model.expert.action_in_proj.frequencies.nbytes
    # Loaded in float32 here, and counted in bfloat16.
    plain_bytes = sum(p.nbytes for p in model.parameters()) + sum(
        m.bias.nbytes for m in model.modules() if isinstance(m, Fp8Linear) and m.bias is not None
    )
    assert held - constants - plain_bytes // 2 == sizes["w4a8, w4a16"]


def test_matrices_with_rotations_of_their_own_stand_side_by_side(checkpoint: Path, tmp_path: Path) -> None:
    copy = damaged(checkpoint, tmp_path, {f"{Q_PROJ}.theta": lambda t: t + 0.5})
    layer = load(copy).model.language.layers[1].qkv
    assert isinstance(layer, SideBySide)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    assert layer(x).shape == (3, 128)
    assert layer.dequantised().shape == (128, 128)
    whole = load(checkpoint).model.language.layers[1].qkv
    assert isinstance(whole, QuantisedLinear)
    # Keys and values are what they were.
    torch.testing.assert_close(layer(x)[:, 64:], whole(x)[:, 64:], atol=1e-6, rtol=1e-6)


def damaged(checkpoint: Path, tmp_path: Path, edits: dict[str, Callable[[torch.Tensor], torch.Tensor | None]]) -> Path:
    """A copy with tensors changed, or left out where the edit gives None."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    for name, edit in edits.items():
        changed = edit(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({f"{Q_PROJ}.scales": lambda t: None}, rf"missing: {Q_PROJ}.scales"),
        (
            {f"{Q_PROJ}.scales": lambda t: t.repeat(2, 1)},
            r"q_proj.scales: shape \[1, 64\] is required, found \[2",
        ),
        ({f"{Q_PROJ}.qweight": lambda t: t[:, :4]}, r"q_proj.qweight: shape \[128, 8\] is required, found \[128, 4\]"),
        ({f"{Q_PROJ}.qweight": lambda t: t.to(torch.int16)}, "q_proj.qweight: I32 is required, found I16"),
        ({f"{Q_PROJ}.pairs": torch.zeros_like}, "each channel 0 to 127"),
        ({f"{Q_PROJ}.channel_scales": lambda t: t * torch.nan}, "channel scales without nan"),
    ],
)
def test_tensors_that_are_wrong(
    checkpoint: Path, tmp_path: Path, edits: dict[str, Callable[..., torch.Tensor | None]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(damaged(checkpoint, tmp_path, edits))


def test_one_of_three_matrices_in_four_bits(plain: Alpamayo, checkpoint: Path, tmp_path: Path) -> None:
    copy = damaged(checkpoint, tmp_path, {})
    tensors = load_file(copy / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith(f"{Q_PROJ}.")}
    kept[f"{Q_PROJ}.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}.weight: 4 bits are required"):
        load(copy)


@pytest.mark.parametrize(("key", "value"), [("group_size", 64), ("bits", 8), ("krot", 4), ("quant_method", "awq")])
def test_configuration_of_another_quantisation(checkpoint: Path, tmp_path: Path, key: str, value: object) -> None:
    copy = damaged(checkpoint, tmp_path, {})
    entry = {"quant_method": "paroquant", "bits": 4, "group_size": 128, "krot": 8} | {key: value}
    edit_json(copy / "config.json", quantization_config=entry)
    with pytest.raises(CheckpointError, match=rf"quantization_config.{key} must be .*, found {value!r}"):
        load(copy)


def test_static_scales_come_with_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    stages = StagePrecision(prefill="w4a8", decode="w4a8", expert="fp8_static")
    with pytest.raises(
        CheckpointError, match=r"'largest_inputs' in config.json.*found none for \d+ layer.*expert.layers"
    ):
        load(checkpoint, stages)
    copy = damaged(checkpoint, tmp_path, {})
    expert = load(checkpoint, PRESETS["w4a8"]).model.expert
    names = [f"expert.{name}" for name, module in expert.named_modules() if isinstance(module, Fp8Linear)]
    edit_json(copy / "config.json", largest_inputs=dict.fromkeys(names, 3.0))
    layer = load(copy, stages).model.expert.layers[0].qkv
    assert isinstance(layer, Fp8Linear)
    assert layer.input_scale == pytest.approx(6 / 448)


def test_head_in_four_bits(checkpoint: Path) -> None:
    stages = StagePrecision.parse("prefill=w4a8,decode=w4a8,lm_head=int4")
    head = load(checkpoint, stages).model.language.lm_head
    assert isinstance(head, Int4Linear)
    exact = load(checkpoint, replace(stages, lm_head="bf16")).model.language.lm_head.weight
    assert 0.03 < (head.dequantised() - exact).norm() / exact.norm() < 0.15


def test_four_bits_are_asked_of_those_that_have_them(
    plain: Alpamayo, checkpoint: Path, tokenizer_files: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="stored in 4 bits: w4a8 or w4a16 is required, found fp8"):
        load(checkpoint, PRESETS["fp8"])
    whole = save_quantised(plain, {}, PRESETS["bf16"], plain.config, tmp_path / "plain", tokenizer_files)
    with pytest.raises(CheckpointError, match="flashdrive quantize"):
        load(whole, PRESETS["w4a8"])
    with pytest.raises(InputError, match="one of bf16, fp8"):
        StagePrecision.parse("w3")
    with pytest.raises(InputError, match="same weights"):
        StagePrecision(prefill="fp8", decode="w4a8")
    assert StagePrecision.parse("vision=fp8,lm_head=int8") == StagePrecision(vision="fp8", lm_head="int8")
