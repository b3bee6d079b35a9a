"""Tiny random models of many architectures, made from `transformers`' configs."""

from functools import cache

import torch
import transformers
from torch import nn

from sae_steer.model.hf.loading import adapt_hf
from sae_steer.model.hf.model import HFModel

USUAL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
GEMMA = {**USUAL, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
MIXTURE = {**USUAL, "num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "Llama with biases": ("LlamaConfig", {**USUAL, "attention_bias": True, "mlp_bias": True}),
    "Llama, scaled linearly": (
        "LlamaConfig", {**USUAL, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "Qwen2": ("Qwen2Config", USUAL),
    "Qwen2, windows": (
        "Qwen2Config", {**USUAL, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "Qwen3": ("Qwen3Config", {**USUAL, "head_dim": 8}),
    "Mistral": ("MistralConfig", {**USUAL, "sliding_window": 8}),
    "Gemma 2": ("Gemma2Config", {**GEMMA, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0}),
    "Gemma 3": ("Gemma3TextConfig", GEMMA),
    "GPT-2": (
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": None,
         "eos_token_id": None},
    ),
    "GPT-NeoX": ("GPTNeoXConfig", {**USUAL, "rotary_pct": 0.5}),
    "Phi-3": ("Phi3Config", USUAL),
    "OLMo 2": ("Olmo2Config", USUAL),
    "StableLM": ("StableLmConfig", {**USUAL, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "Falcon": ("FalconConfig", {**USUAL, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "Falcon, ALiBi": (
        "FalconConfig", {**USUAL, "alibi": True, "multi_query": False, "parallel_attn": False},
    ),
    "Bloom": ("BloomConfig", {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "Mixtral": ("MixtralConfig", MIXTURE),
    "Qwen2 MoE": (
        "Qwen2MoeConfig",
        {**USUAL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
    ),
    "Granite": (
        "GraniteConfig",
        {**USUAL, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
         "attention_multiplier": 0.2},
    ),
    "Cohere": ("CohereConfig", USUAL),
    "OPT": (
        "OPTConfig",
        {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "gpt-oss": ("GptOssConfig", {**MIXTURE, "head_dim": 8, "sliding_window": 8, "rope_parameters": None}),
    "DeepSeek V3": (
        "DeepseekV3Config",
        {**USUAL, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
         "v_head_dim": 8, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
}  # fmt: skip


def tiny(name: str, seed: int = 0, **changes) -> nn.Module:
    """A random model of that architecture, its weights large enough that every part matters."""
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else parameter.add_(torch.rand(parameter.shape) / 2)
    return model.eval()


@cache
def adapted(name: str) -> tuple[nn.Module, HFModel]:
    """The model, and what the package makes of it."""
    model = tiny(name)
    return model, adapt_hf(model)
