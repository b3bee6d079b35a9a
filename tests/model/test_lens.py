"""A TransformerLens model runs as itself: its own forward, nothing above the last layer asked, nothing folded."""

import pytest
import torch
from lens_models import gpt2_like

from sae_steer.errors import InputError
from sae_steer.model.language_model import LanguageModel, fingerprint
from sae_steer.model.lens import LensModel, adapt, load_lens, to_hooked_transformer
from sae_steer.model.sampling import sample
from sae_steer.randomness import generator

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def hooked():
    return gpt2_like(d_vocab=64)


@pytest.fixture(scope="module")
def lens(hooked) -> LensModel:
    return adapt(hooked)


def test_it_is_a_model_of_a_pair(lens):
    assert isinstance(lens, LanguageModel)
    assert (lens.shape.n_layers, lens.shape.d_model, lens.shape.d_vocab, lens.shape.n_ctx) == (3, 32, 64, 512)
    assert lens.W_U.shape == (64, 32)


@torch.no_grad()
def test_streams_are_those_of_run_with_cache_and_later_blocks_never_run(lens, hooked, tokens):
    _, cache = hooked.run_with_cache(tokens)
    ran = []
    hook = hooked.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    found = lens.resid_posts(tokens, (1, 0))
    hook.remove()
    assert ran == []
    assert sorted(found) == [0, 1]
    for layer, resid in found.items():
        assert torch.equal(resid, cache[f"blocks.{layer}.hook_resid_post"])


@torch.no_grad()
def test_the_lens_after_the_last_block_is_the_models_own_output(lens, hooked, tokens):
    last = lens.resid_posts(tokens, (2,))[2]
    torch.testing.assert_close(lens.unembed(last), hooked(tokens), **CLOSE)
    torch.testing.assert_close(lens(tokens), hooked(tokens), **CLOSE)
    torch.testing.assert_close(lens.unembed(last[0, 5]), hooked(tokens)[0, 5], **CLOSE)


@torch.no_grad()
def test_a_soft_cap_on_the_logits_is_kept(tokens):
    capped = adapt(gpt2_like(d_vocab=64, output_logits_soft_cap=3.0))
    assert capped(tokens).abs().max() < 3.0
    torch.testing.assert_close(capped.unembed(capped.resid_posts(tokens, (2,))[2]), capped(tokens), **CLOSE)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_to_its_left(lens, tokens):
    padded = torch.nn.functional.pad(tokens, (0, 7))
    kept = lens.resid_posts(padded, (1,))[1][:, : tokens.shape[1]]
    torch.testing.assert_close(kept, lens.resid_posts(tokens, (1,))[1], **CLOSE)


def test_the_fingerprint_is_of_what_the_model_computes(hooked, lens):
    assert fingerprint(adapt(gpt2_like(d_vocab=64))) == fingerprint(lens)
    assert fingerprint(adapt(gpt2_like(d_vocab=64, seed=1))) != fingerprint(lens)
    assert fingerprint(adapt(gpt2_like(d_vocab=64, eps=1e-3))) != fingerprint(lens)


def test_a_layer_it_lacks_is_named(lens, tokens):
    with pytest.raises(InputError, match="has no layer 3; it has layers 0 to 2"):
        lens.resid_posts(tokens, (3,))


def test_what_is_no_causal_model_is_refused():
    with pytest.raises(InputError, match="a dict cannot be a model of a pair"):
        adapt({})
    with pytest.raises(InputError, match="bidirectional"):
        adapt(gpt2_like(d_vocab=64, attention_dir="bidirectional"))


def test_a_named_model_is_loaded_without_any_processing(monkeypatch, hooked):
    from transformer_lens import HookedTransformer

    asked = []

    def loads(name, **options):
        asked.append((name, options))
        return hooked

    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", loads)
    assert load_lens("gpt2").hooked is hooked
    assert asked == [("gpt2", {})]


def test_a_name_that_cannot_be_loaded_is_told_in_one_line():
    with pytest.raises(InputError, match="TransformerLens cannot load 'tl:no-such-model'") as refused:
        load_lens("no-such-model")
    assert "\n" not in str(refused.value)


def test_moved_it_says_where_it_is(lens, tokens):
    moved = lens.to("cpu")
    assert moved is lens
    assert lens.device.type == lens.shape.device == "cpu"


def test_plans_are_sampled_from_the_same_noise_as_our_own_decoder(model):
    ours, theirs = (
        sample(each, [[1, 2, 3], [4], [5] * 40], end_id=7, max_tokens=30, temperature=1.0, generator=generator(5))
        for each in (model, adapt(to_hooked_transformer(model)))
    )
    assert ours == theirs
    assert [len(text) for text in ours[2:]] == [0]
    assert max(map(len, ours)) > 3
