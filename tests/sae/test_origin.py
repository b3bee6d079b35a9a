"""A dictionary's own words about its site are read in every spelling, and checked."""

import pytest

from sae_steer.errors import InputError
from sae_steer.sae.origin import Origin

OF_LAYER_2 = [
    {},
    {"metadata": {"hook_name": "blocks.2.hook_resid_post"}},
    {"hook_point": "blocks.2.hook_resid_post", "hook_point_layer": 2},
    {"hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": 2},
    {"hook_name": "blocks.3.hook_resid_pre", "hook_layer": 3},
    {"hook_layer": 2},
    {"metadata": {"hook_name": "blocks.2.hook_out"}},
    {"metadata": {"hook_name": "model.layers.2"}},
    {"metadata": {"hook_name": "transformer.h.2"}},
    {"metadata": {"hook_name": "gpt_neox.layers.2", "hook_head_index": None}},
]
OF_OTHER_SITES = [
    {"metadata": {"hook_name": "blocks.5.hook_mlp_out"}},
    {"metadata": {"hook_name": "blocks.2.hook_mlp_out"}},
    {"metadata": {"hook_name": "blocks.2.hook_resid_mid"}},
    {"metadata": {"hook_name": "blocks.2.attn.hook_z"}},
    {"metadata": {"hook_name": "blocks.2.hook_resid_pre"}},
    {"metadata": {"hook_name": "blocks.12.hook_resid_post"}},
    {"metadata": {"hook_name": "model.layers.2.mlp"}},
    {"metadata": {"hook_name": "hook_embed"}},
    {"hook_layer": 5},
    {"hook_name": "blocks.2.hook_resid_post", "hook_layer": 5},
    {"hook_name": "blocks.2.hook_resid_post", "hook_head_index": 3},
]


@pytest.mark.parametrize("config", OF_LAYER_2)
def test_the_stream_after_a_block_has_many_names(config: dict) -> None:
    Origin.of(config).check_stream(2)


@pytest.mark.parametrize("config", OF_OTHER_SITES)
def test_any_other_site_is_refused_by_name(config: dict) -> None:
    with pytest.raises(InputError, match="this dictionary says it reads") as refused:
        Origin.of(config).check_stream(2)
    assert "\n" not in str(refused.value)


def test_a_site_that_is_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="hook_name = 5, which is no str"):
        Origin.of({"metadata": {"hook_name": 5}})
