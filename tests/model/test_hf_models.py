"""Any causal model of `transformers` is a model of a pair: its streams and logits are those it puts out itself."""

import pytest
import torch
import transformers
from hf_models import ARCHITECTURES, USUAL, adapted, tiny
from torch import nn

from sae_steer.errors import InputError
from sae_steer.model.hf.loading import adapt_hf
from sae_steer.model.language_model import LanguageModel, fingerprint

TOKENS = torch.randint(0, 61, (3, 24), generator=torch.Generator().manual_seed(5))


def check_equal(ours, theirs, share: float = 1e-5) -> None:
    assert (ours - theirs).abs().max() <= share * theirs.abs().max()


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(params=ARCHITECTURES, ids=list(ARCHITECTURES))
def both(request):
    return adapted(request.param)


@torch.no_grad()
def test_streams_and_logits_are_the_models_own(both):
    theirs, ours = both
    assert isinstance(ours, LanguageModel)
    own = theirs(TOKENS, output_hidden_states=True, use_cache=False)
    streams = ours.resid_posts(TOKENS, tuple(range(ours.shape.n_layers)))
    for layer in range(ours.shape.n_layers - 1):
        check_equal(streams[layer], own.hidden_states[layer + 1])
    check_equal(ours.norm(streams[ours.shape.n_layers - 1]), own.hidden_states[-1])
    check_equal(ours(TOKENS), own.logits)
    check_equal(ours.unembed(streams[ours.shape.n_layers - 1]), own.logits)
    check_equal(ours.run(streams[0], start=1), streams[ours.shape.n_layers - 1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["Gemma 2", "GPT-2", "Mixtral"])
def test_after_any_call_the_model_is_as_it_was(name):
    theirs, ours = adapted(name)
    blocks = [type(block).__name__ for block in ours.layers]
    before, hooks = theirs(TOKENS).logits, count_hooks(theirs)
    ours.resid_posts(TOKENS, (0,))
    with pytest.raises(IndexError):
        ours(torch.full((1, 3), 999))
    assert "Place" not in "".join(blocks + [type(block).__name__ for block in ours.layers])
    assert torch.equal(theirs(TOKENS).logits, before)
    assert count_hooks(theirs) == hooks


@torch.no_grad()
def test_what_attention_and_mlp_write_sums_to_what_a_block_adds(both):
    _, ours = both
    written = []
    hooks = [term.register_forward_hook(lambda _, inputs, output: written.append(output)) for term in ours.writers(1)]
    streams = ours.resid_posts(TOKENS, (0, 1))
    for hook in hooks:
        hook.remove()
    check_equal(sum(term.view(streams[0].shape) for term in written), streams[1] - streams[0], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama with biases", "GPT-2", "Gemma 2"])
def test_with_the_final_norms_divisor_held_the_readout_is_its_equation(name):
    theirs, ours = adapted(name)
    resid, change = torch.randn(2, 5, 32).unbind()
    norm = ours.norm
    if isinstance(norm, nn.LayerNorm):
        scale = (resid.var(-1, keepdim=True, unbiased=False) + norm.eps).rsqrt()
        moved = resid + change
        normed = (moved - moved.mean(-1, keepdim=True)) * scale * norm.weight + norm.bias
    else:
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        gain = norm.weight + 1 if name == "Gemma 2" else norm.weight
        normed = (resid + change) * (resid.square().mean(-1, keepdim=True) + eps).rsqrt() * gain
        check_equal(ours.gain, gain)
    logits = theirs.get_output_embeddings()(normed)
    logits = 5.0 * torch.tanh(logits / 5.0) if name == "Gemma 2" else logits
    check_equal(ours.unembed_frozen(resid, change), logits)


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-2"])
def test_the_fingerprint_is_of_weights_and_config(name):
    theirs, ours = adapted(name)
    assert ours.n_parameters == sum(parameter.numel() for parameter in theirs.parameters())
    before = fingerprint(ours)
    assert before == fingerprint(ours)
    weight = next(iter(theirs.parameters()))
    with torch.no_grad():
        weight[0, 0] += 1
        assert fingerprint(ours) != before
        weight[0, 0] -= 1


@torch.no_grad()
def test_a_model_in_bfloat16_is_taken_in_its_own_type():
    ours = adapt_hf(tiny("Qwen2").bfloat16())
    assert ours.resid_posts(TOKENS, (1,))[1].dtype == torch.bfloat16


def around(model: nn.Module) -> nn.Module:
    """Between the first two blocks, something that is in no block changes the stream."""
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.01, *args[1:]))
    return model


def test_a_model_whose_blocks_do_not_pass_one_stream_is_refused_by_name():
    with pytest.raises(InputError, match=r"a Qwen2ForCausalLM has no list of 3 blocks .*model\.layers"):
        adapt_hf(around(tiny("Qwen2")))


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(InputError, match="attending to earlier tokens alone"):
        adapt_hf(tiny("Llama with biases", is_causal=False))


def test_a_last_norm_that_is_none_is_refused():
    model = tiny("Qwen2")
    model.model.norm.register_forward_hook(lambda module, inputs, output: output.tanh())
    with pytest.raises(InputError, match="no root-mean-square norm and no layer norm"):
        adapt_hf(model)


OPT = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61, "ffn_dim": 16}
LINEAR = {f"linear_{part}": 8 for part in ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
OF_ANOTHER_KIND = {
    "T5": (lambda: transformers.T5Config(vocab_size=61, d_model=32, d_ff=16, num_layers=2), "no causal language model"),
    "Mamba": (
        lambda: transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2),
        "no causal language model",
    ),
    "a mix of attention and recurrence": (
        lambda: transformers.Qwen3NextConfig(**{**USUAL, **LINEAR, **EXPERTS, "head_dim": 8}),
        "keeps more than keys and values",
    ),
    "a stream wider than its embedding": (
        lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=16),
        "has one width",
    ),
}


@pytest.mark.parametrize(("config", "told"), OF_ANOTHER_KIND.values(), ids=list(OF_ANOTHER_KIND))
def test_models_of_another_kind_are_refused_by_name(config, told):
    settings = config()
    loader = transformers.T5ForConditionalGeneration if settings.is_encoder_decoder else None
    torch.manual_seed(0)
    model = loader(settings) if loader else transformers.AutoModelForCausalLM.from_config(settings)
    with pytest.raises(InputError, match=told) as refused:
        adapt_hf(model)
    assert type(model).__name__ in str(refused.value)
