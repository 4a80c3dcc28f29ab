"""The drafter against a recording of the DFlash package (dflash 0.1.0), and the files that it takes and refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdrive_node.engine.drafter import (
    VOCABULARY_FILE,
    Drafter,
    load_drafter,
    load_drafter_of,
    read_draft_vocabulary,
)
from flashdrive_node.engine.drafter_config import parse_drafter_config
from flashdrive_node.engine.mask_embedding import convert_mask_embedding, read_mask_embedding
from flashdrive_node.model.errors import CheckpointError, ConfigError, InputError
from support.small_models import random_model, small_config

RECORDED = Path(__file__).parents[1] / "data" / "dflash_small"
TARGET = small_config(layers=5)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The recorded drafter as a release has it, to be changed."""
    folder = tmp_path / "drafter"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "mask_embedding.pt"):
        shutil.copy(RECORDED / name, folder)
    return folder


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def load(directory: Path) -> Drafter:
    return load_drafter(directory, TARGET, "cpu", torch.float32)


@pytest.mark.parametrize("length", [1, 3])
def test_hidden_states_equal_the_recorded_ones(directory, length):
    edit_config(directory, context_len=length)
    drafter, recording = load(directory), load_file(RECORDED / "recording.safetensors")
    assert drafter.config.context_length == length
    other = torch.randn(1, length, drafter.config.context_size)  # a second text beside must not matter
    token = recording["token"].expand(2, -1)
    hidden = drafter(token, torch.cat((other, recording[f"context.{length}"][None])))
    torch.testing.assert_close(hidden[1], recording[f"hidden.{length}"], rtol=1e-5, atol=1e-5)


def test_proposals_are_the_likeliest_tokens_of_the_targets_head(directory):
    drafter, model = load(directory), random_model(TARGET, 0)
    token = torch.tensor([17])
    context = torch.randn(1, 3, drafter.config.context_size, generator=torch.Generator().manual_seed(1))
    hidden = drafter(model.language.embed_tokens.weight[token], context)
    scores = hidden[0] @ model.language.lm_head.weight.T
    guesses = drafter.propose(model.language, token, context, None)[0]
    assert guesses.tolist() == scores.argmax(dim=-1).tolist()
    bias = torch.zeros(scores.shape[1])
    bias[guesses] = -torch.inf
    assert not set(drafter.propose(model.language, token, context, bias)[0].tolist()) & set(guesses.tolist())
    # Stateless: the same call again gives the same guesses.
    assert torch.equal(drafter.propose(model.language, token, context, None)[0], guesses)


def test_reduced_vocabulary_guesses_its_own_tokens_alone(directory):
    drafter, model = load(directory), random_model(TARGET, 0)
    token, context = torch.tensor([17, 3]), torch.randn(2, 3, drafter.config.context_size)
    hidden = drafter(model.language.embed_tokens.weight[token], context)
    ids = torch.tensor([40, 7, 93, 12])
    scores = hidden @ model.language.lm_head.weight[ids].T
    assert read_draft_vocabulary(directory) is None
    save_file({"ids": ids}, directory / VOCABULARY_FILE)
    assert drafter.vocabulary is None
    drafter = load_drafter_of(directory, model)
    assert drafter.vocabulary == 4
    assert torch.equal(drafter.propose(model.language, token, context, None), ids[scores.argmax(dim=-1)])
    bias = torch.zeros(len(model.language.lm_head.weight))
    bias[[40, 93, 12]] = -torch.inf
    assert set(drafter.propose(model.language, token, context, bias).flatten().tolist()) == {7}


@pytest.mark.parametrize("ids", [[], [3, 3], [-1, 2], [2, 10**6]], ids=str)
def test_bad_draft_vocabularies_are_refused(directory, ids):
    drafter, model = load(directory), random_model(TARGET, 0)
    with pytest.raises(InputError, match="draft vocabulary: different ids of 0 to"):
        drafter.restrict(model.language, torch.tensor(ids, dtype=torch.int64))
    save_file({"tokens": torch.arange(3)}, directory / VOCABULARY_FILE)
    with pytest.raises(CheckpointError, match="int64 'ids' alone are required, found"):
        read_draft_vocabulary(directory)
    (directory / VOCABULARY_FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_draft_vocabulary(directory)


def test_both_layouts_of_the_configuration(directory):
    own = {"target_layer_ids": [1, 3, 4], "mask_token_id": 200, "block_size": 8, "context_len": 3}
    top = load(directory).config
    edit_config(directory, **dict.fromkeys(own), dflash_config=own)
    assert load(directory).config == top
    edit_config(directory, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert load(directory).config == top
    nested = {k: v for k, v in own.items() if k != "context_len"}
    edit_config(directory, dflash_config=nested)
    assert load(directory).config == replace(top, context_length=1)


def test_mask_embedding_as_pickle_and_as_safetensors(directory):
    expected = torch.load(directory / "mask_embedding.pt", weights_only=True)
    torch.testing.assert_close(load(directory).mask_embedding, expected, rtol=0, atol=0)
    path = convert_mask_embedding(directory, 32)
    (directory / "mask_embedding.pt").unlink()
    assert path.name == "mask_embedding.safetensors"
    torch.testing.assert_close(load(directory).mask_embedding, expected, rtol=0, atol=0)
    with pytest.raises(FileExistsError):
        convert_mask_embedding(directory, 32)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/never-created-by-a-checkpoint"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Malicious(), "cannot be read as tensors alone"),
        (torch.zeros(31), r"one vector of 32 real numbers is required, found \[31\]"),
        (torch.zeros(32, dtype=torch.int64), "real numbers is required"),
        (torch.full((32,), torch.nan), "finite numbers are required"),
        ("text", "one vector of 32 real numbers is required, found str"),
    ],
)
def test_bad_mask_embeddings_are_refused(directory, content, message):
    torch.save(content, directory / "mask_embedding.pt")
    with pytest.raises(CheckpointError, match=message):
        load(directory)
    assert not Path("/tmp/never-created-by-a-checkpoint").exists()


def test_missing_mask_embedding_is_named(directory):
    (directory / "mask_embedding.pt").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="cannot be read as tensors alone"):
        read_mask_embedding(directory, 32)
    (directory / "mask_embedding.pt").unlink()
    with pytest.raises(CheckpointError, match=r"one of mask_embedding\.safetensors, .* is required"):
        load(directory)


def test_every_problem_of_a_configuration_is_listed(directory):
    content = json.loads((directory / "config.json").read_text())
    del content["target_layer_ids"], content["rms_norm_eps"]
    content |= {"hidden_size": 48, "block_size": 1, "attention_bias": True, "layer_types": ["sliding_attention"]}
    content |= {"mask_token_id": "x"}
    with pytest.raises(ConfigError) as caught:
        parse_drafter_config(content, TARGET, "config.json")
    text = str(caught.value)
    for expected in (
        "key 'rms_norm_eps' must be a positive number, found None",
        "key 'target_layer_ids' must be a list of int, found None",
        "block_size must be at least 2, found 1",
        "hidden_size must be the target's, 32, found 48",
        "key 'attention_bias' must be False, found True",
        "layer_types must be 'full_attention', found ['sliding_attention']",
        "key 'mask_token_id' must be a positive int, found 'x'",
    ):
        assert expected in text
    assert len(caught.value.problems) == 7


def test_layers_that_the_target_lacks_are_refused(directory):
    edit_config(directory, target_layer_ids=[1, 3, 5])
    with pytest.raises(ConfigError, match=r"target_layer_ids must be 0 to 4, found \[5\]"):
        load(directory)


def test_weights_that_do_not_fit_are_refused(directory):
    weights = load_file(directory / "model.safetensors")
    weights["fc.weight"] = weights["fc.weight"][:, :64].contiguous()
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    assert len(caught.value.problems) == 2
