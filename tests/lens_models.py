"""Small TransformerLens models in memory: a GPT-2 with LayerNorm and learned positions, of any size."""

import torch


def gpt2_like(*, seed: int = 0, d_vocab: int = 1029, n_layers: int = 3, n_ctx: int = 512, **changes):
    """A `HookedTransformer` with random weights, large enough that every part matters."""
    import warnings

    from transformer_lens import HookedTransformer, HookedTransformerConfig

    widths = {"d_model": 32, "d_head": 8, "n_heads": 4, "d_mlp": 64, **changes}
    config = HookedTransformerConfig(
        n_layers=n_layers, n_ctx=n_ctx, d_vocab=d_vocab, act_fn="gelu_new", normalization_type="LN", seed=seed,
        device="cpu", **widths,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated")
        model = HookedTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 1)) * 0.2)
    return model
