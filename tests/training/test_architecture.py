"""The small model's dimensions and first weights."""

import pytest
import torch

from flashdrive_node.model.errors import ConfigError
from flashdrive_node.model.images import target_size
from flashdrive_node.model.presets import alpamayo_1_5_10b, parameter_count
from flashdrive_node.training.architecture import IMAGE_SIZE, alpamayo_small
from flashdrive_node.training.initial_weights import bin_embeddings, new_model
from flashdrive_node.training.vocabulary import HISTORY_BINS, VocabularyLayout

LAYOUT = VocabularyLayout(base_size=538, bins=HISTORY_BINS)


def test_it_fits_into_its_room_and_speaks_the_releases_language():
    config = alpamayo_small(LAYOUT)
    assert 2 * parameter_count(config) <= 20.51 * 2**20  # bfloat16
    release = alpamayo_1_5_10b()
    # One key less: the future has no discrete tokens.
    assert release.raw.keys() - config.raw.keys() == {"traj_tokenizer_cfg"}
    assert config.raw.keys() <= release.raw.keys()
    assert config.raw_vlm.keys() == release.raw_vlm.keys()
    assert config.tokens.vocab_size == LAYOUT.size
    assert config.tokens.history_token_start == LAYOUT.base_size


@pytest.mark.parametrize("size", [(1080, 1920), (720, 1280), (320, 576), (160, 288), (240, 432), (288, 512)])
def test_wide_pictures_of_any_size_become_the_same(size):
    config = alpamayo_small(LAYOUT)
    resized = target_size(*size, config.min_pixels, config.max_pixels, config.vision.resize_factor)
    assert resized == IMAGE_SIZE[::-1]


def test_dimensions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="found depth"):
        alpamayo_small(LAYOUT, depth=3)
    with pytest.raises(ConfigError, match="multiple of"):
        alpamayo_small(LAYOUT, text_heads=3)


def test_neighbouring_bins_begin_alike_and_distant_ones_do_not():
    rows = bin_embeddings(1000, 64, torch.Generator().manual_seed(0))
    near = torch.cosine_similarity(rows[:-1], rows[1:], dim=1)
    far = torch.cosine_similarity(rows[:-500], rows[500:], dim=1)
    assert near.min() > 0.5
    assert far.mean() < 0.5
    assert rows.std() == pytest.approx(0.3, rel=0.3)


def test_first_weights_depend_on_the_seed_alone(model):
    again = new_model(model.config, torch.device("cpu"), torch.float32, seed=0)
    other = new_model(model.config, torch.device("cpu"), torch.float32, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.language.lm_head.weight, other.language.lm_head.weight)
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model.action_space.constants, again.action_space.constants)
    # A flow that does not move.
    assert not model.expert.action_out_proj.weight.any()
