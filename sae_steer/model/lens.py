"""Our decoder as a TransformerLens model, for parity and for its users' tools.

The only importer of transformer_lens.
"""

from typing import TYPE_CHECKING

from sae_steer.model.decoder import Decoder

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


def to_hooked_transformer(model: Decoder) -> "HookedTransformer":
    """A `HookedTransformer` with the same weights and the same residual stream: nothing folded or centred."""
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = model.shape
    config = HookedTransformerConfig(
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        n_ctx=shape.n_ctx,
        d_head=shape.d_head,
        n_heads=shape.n_heads,
        n_key_value_heads=None if shape.n_kv_heads == shape.n_heads else shape.n_kv_heads,
        d_mlp=shape.d_mlp,
        d_vocab=shape.d_vocab,
        act_fn="silu",
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=shape.d_head,
        rotary_base=shape.rope_base,
        rotary_adjacent_pairs=False,
        eps=shape.eps,
        tokenizer_prepends_bos=False,
        default_prepend_bos=False,
        device=str(model.device),
    )
    hooked = HookedTransformer(config)
    known = hooked.state_dict()
    ours = _hooked_names(model, underscore=shape.n_kv_heads != shape.n_heads)
    assert set(ours) <= set(known), f"TransformerLens does not know {sorted(set(ours) - set(known))}"
    zeros = {name: torch.zeros_like(tensor) for name, tensor in known.items() if ".b_" in name or "._b_" in name}
    hooked.load_state_dict({**known, **zeros, **ours})
    return hooked.eval()


def _hooked_names(model: Decoder, *, underscore: bool) -> dict:
    from einops import rearrange

    kv = "_" if underscore else ""
    split = "(head d_head) d_model -> head d_model d_head"
    tensors = {"embed.W_E": model.embed_tokens.weight, "unembed.W_U": model.W_U.T, "ln_final.w": model.norm.weight}
    for layer, block in enumerate(model.layers):
        at, attention = f"blocks.{layer}", block.self_attn
        d_head = model.shape.d_head
        tensors |= {
            f"{at}.ln1.w": block.input_layernorm.weight,
            f"{at}.ln2.w": block.post_attention_layernorm.weight,
            f"{at}.attn.W_Q": rearrange(attention.q_proj.weight, split, d_head=d_head),
            f"{at}.attn.{kv}W_K": rearrange(attention.k_proj.weight, split, d_head=d_head),
            f"{at}.attn.{kv}W_V": rearrange(attention.v_proj.weight, split, d_head=d_head),
            f"{at}.attn.W_O": rearrange(
                attention.o_proj.weight, "d_model (head d_head) -> head d_head d_model", d_head=d_head
            ),
            f"{at}.mlp.W_gate": block.mlp.gate_proj.weight.T,
            f"{at}.mlp.W_in": block.mlp.up_proj.weight.T,
            f"{at}.mlp.W_out": block.mlp.down_proj.weight.T,
        }
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
