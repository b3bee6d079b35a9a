"""One model written under every plausible set of names is read as that model, or refused with the names."""

import json
import pickle
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from tiny_pair import lively

from sae_steer.errors import InputError
from sae_steer.model.lens import to_hooked_transformer
from sae_steer.model.loading import load_decoder, read_decoder
from sae_steer.randomness import generator
from sae_steer.settings import PRESETS, DecoderSettings

SHAPE = DecoderSettings(n_layers=2, n_heads=4, n_kv_heads=4, d_model=32, d_head=8, d_mlp=64, d_vocab=53, n_ctx=40)
CONFIG = {
    "model_type": "interpgpt", "vocab_size": 53, "max_seq_len": 40, "n_layers": 2, "n_heads": 4, "d_model": 32,
    "d_ff": 96, "dropout": 0.25, "pad_id": 52, "pad_token_id": 52, "bias": False, "variant": "standard",
    "architectures": None, "transformers_version": "5.5.4",
}  # fmt: skip

NAMES = {
    "llama": {
        "top": ("embed_tokens.weight", "norm.weight", "lm_head.weight"), "block": "layers",
        "norms": ("input_layernorm.weight", "post_attention_layernorm.weight"),
        "attention": "self_attn.{}_proj.weight",
        "mlp": ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    },
    "meta": {
        "top": ("tok_embeddings.weight", "norm.weight", "output.weight"), "block": "layers",
        "norms": ("attention_norm.weight", "ffn_norm.weight"),
        "attention": "attention.w{}.weight",
        "mlp": ("feed_forward.w1.weight", "feed_forward.w3.weight", "feed_forward.w2.weight"),
    },
    "xformers": {
        "top": ("tok_emb.weight", "final_norm.scale", "head.weight"), "block": "blocks",
        "norms": ("norm1.scale", "norm2.scale"),
        "attention": "attn.W_{}.weight", "mlp": ("ffn.w1.weight", "ffn.w2.weight", "ffn.w3.weight"),
    },
    "nano": {
        "top": ("wte.weight", "ln_f.weight", "lm_head.weight"), "block": "h", "norms": ("ln_1.weight", "ln_2.weight"),
        "attention": "attn.{}_proj.weight", "qkv": "attn.c_attn.weight", "out": "attn.c_proj.weight",
        "mlp": ("mlp.gate.weight", "mlp.up.weight", "mlp.c_proj.weight"), "fused": "mlp.c_fc.weight",
    },
    "plain": {
        "top": ("token_embedding.weight", "ln_final.g", "unembed.weight"), "block": "blocks",
        "norms": ("attn_norm.g", "mlp_norm.g"),
        "attention": "attention.{}.weight", "qkv": "attention.qkv.weight", "out": "attention.out_proj.weight",
        "mlp": ("mlp.w_gate.weight", "mlp.w_up.weight", "mlp.w_down.weight"), "fused": "mlp.gate_up_proj.weight",
    },
}  # fmt: skip
PREFIXES = ("", "model.", "transformer.", "_orig_mod.", "module.", "module._orig_mod.model.transformer.")


def written(model, names: dict, *, fuse: bool, prefix: str = "", head: bool = False) -> dict[str, torch.Tensor]:
    """The model's tensors under a set of names, with the buffers such a checkpoint would hold."""
    embed, norm, lm_head = names["top"]
    tensors = {embed: model.embed_tokens.weight, norm: model.norm.weight, "rope.inv_freq": torch.rand(4)}
    tensors |= {lm_head: model.W_U.clone()} if head else {}
    for layer, block in enumerate(model.layers):
        at, attention = f"{names['block']}.{layer}.", block.self_attn
        qkv = [getattr(attention, f"{part}_proj").weight for part in "qkv"]
        gate_up = [block.mlp.gate_proj.weight, block.mlp.up_proj.weight]
        gate, up, down = names["mlp"]
        inner = {
            names["norms"][0]: block.input_layernorm.weight,
            names["norms"][1]: block.post_attention_layernorm.weight,
            names.get("out", names["attention"].format("o")): attention.o_proj.weight,
            down: block.mlp.down_proj.weight,
            "attn.rotary.cos": torch.rand(40, 8),
            "attn.rotary.sin_cached": torch.rand(40, 8),
        }
        if fuse:
            inner |= {names["qkv"]: torch.cat(qkv), names["fused"]: torch.cat(gate_up)}
        else:
            inner |= {names["attention"].format(part): weight for part, weight in zip("qkv", qkv, strict=True)}
            inner |= dict(zip((gate, up), gate_up, strict=True))
        tensors |= {at + name: tensor for name, tensor in inner.items()}
    return {prefix + name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def model():
    return lively(SHAPE, 3)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 53, (2, 20), generator=generator(3))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def save(folder: Path, tensors: dict) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def hooked_tensors(model) -> dict[str, torch.Tensor]:
    """What `torch.save(hooked.state_dict())` of the release holds: masks, rotary tables and zero biases included."""
    return {name: tensor.clone() for name, tensor in to_hooked_transformer(model).state_dict().items()}


def refusal(path, **options) -> str:
    with pytest.raises(InputError) as refused:
        read_decoder(path, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@torch.no_grad()
@pytest.mark.parametrize("head", [False, True], ids=["head tied", "head stored"])
@pytest.mark.parametrize(("names", "fuse"), [*((name, False) for name in NAMES), ("nano", True), ("plain", True)])
def test_every_layout_gives_the_same_logits_from_safetensors_and_from_a_bundle(
    model, tokens, folder, names, fuse, head
):
    number = list(NAMES).index(names)
    tensors = written(model, NAMES[names], fuse=fuse, prefix=PREFIXES[number + fuse], head=head)
    save(folder, tensors)
    assert torch.equal(load_decoder(folder)(tokens), model(tokens))
    (folder / "model.safetensors").unlink()
    wrapped = [tensors, {"model": tensors, "step": 3}, {"state_dict": tensors, "optimizer": {"state": {}}}][number % 3]
    torch.save(wrapped, folder / "model.pt")
    assert torch.equal(load_decoder(folder)(tokens), model(tokens))


def test_the_map_names_each_tensor_once_and_what_was_left_out(model, folder):
    found = read_decoder(save(folder, written(model, NAMES["nano"], fuse=True, prefix="transformer.", head=True)))
    read, left_out = found.record["key_map"], found.record["left_out"]
    assert read["transformer.h.1.attn.c_attn.weight"] == [f"layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    assert read["transformer.wte.weight"] == ["embed_tokens.weight"]
    assert sorted(name for ours in read.values() for name in ours) == sorted(model.state_dict())
    assert {"transformer.lm_head.weight", "transformer.rope.inv_freq", "transformer.h.0.attn.rotary.cos"} <= {*left_out}
    lines = "\n".join(found.lines())
    assert "transformer.h.*.mlp.c_proj.weight -> layers.*.mlp.down_proj.weight (2 layers)" in lines
    assert "fused projections: blocks, gate-first (the usual order" in lines


def test_what_does_not_fit_is_listed(model, folder):
    tensors = written(model, NAMES["nano"], fuse=False)
    tensors["h.0.adapter.weight"] = torch.ones(3, 3)
    tensors["h.1.attn.q_proj.bias"] = torch.ones(32)
    tensors["h.1.mlp.up.weight"] = torch.ones(64, 31)
    line = refusal(save(folder, tensors))
    assert "h.0.adapter.weight (3, 3)" in line
    assert "h.1.attn.q_proj.bias (32,)" in line
    assert "h.1.mlp.up.weight (64, 31) instead of (64, 32)" in line
    del tensors["h.0.adapter.weight"], tensors["h.1.attn.q_proj.bias"], tensors["h.1.mlp.up.weight"]
    assert "missing: layers.1.mlp.up_proj.weight" in refusal(save(folder, tensors))
    tensors["h.1.mlp.up.weight"] = tensors["h.1.mlp.w_up.weight"] = torch.ones(64, 32)
    assert "layers.1.mlp.up_proj.weight has h.1.mlp.up.weight and h.1.mlp.w_up.weight" in refusal(
        save(folder, dict(tensors) | {"h.1.mlp.w_up.weight": torch.zeros(64, 32)})
    )


def test_biases_that_are_zero_are_left_out(model, tokens, folder):
    tensors = written(model, NAMES["meta"], fuse=False)
    tensors["layers.0.attention.wq.bias"] = torch.zeros(32)
    assert torch.equal(load_decoder(save(folder, tensors))(tokens), model(tokens))


def test_a_stored_head_that_is_no_copy_is_refused_unless_the_config_unties_it(model, tokens, folder):
    tensors = written(model, NAMES["nano"], fuse=False, head=True)
    tensors["lm_head.weight"] += 1.0
    assert "a head that is not its embedding" in refusal(save(folder, tensors))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": False}))
    loaded = load_decoder(folder)
    torch.testing.assert_close(loaded.W_U, model.W_U + 1.0)


def per_head(fused: torch.Tensor) -> torch.Tensor:
    return rearrange(fused, "(part head d_head) d -> (head part d_head) d", part=3, d_head=8)


@pytest.mark.parametrize("sibling", [False, True], ids=["set", "decided by hooked_transformer.pt"])
def test_fused_projections_in_another_order_are_read_as_set_or_as_the_bundle_beside_has_them(
    model, tokens, folder, sibling
):
    tensors = written(model, NAMES["plain"], fuse=True)
    for layer in range(2):
        tensors[f"blocks.{layer}.attention.qkv.weight"] = per_head(tensors[f"blocks.{layer}.attention.qkv.weight"])
        tensors[f"blocks.{layer}.mlp.gate_up_proj.weight"] = tensors[f"blocks.{layer}.mlp.gate_up_proj.weight"].roll(
            64, 0
        )
    save(folder, tensors)
    assert not torch.allclose(load_decoder(folder)(tokens), model(tokens), atol=1e-2)
    if sibling:
        torch.save(hooked_tensors(model), folder / "hooked_transformer.pt")
        found = read_decoder(folder)
        assert found.fused == "per-head, up-first (as hooked_transformer.pt has them)"
    else:
        found = read_decoder(folder, qkv="per-head", gate_up="up-first")
        assert found.fused == "per-head, up-first (as set)"
    assert torch.equal(found.model(tokens), model(tokens))


def test_a_bundle_beside_that_is_another_model_is_told(model, folder):
    save(folder, written(model, NAMES["plain"], fuse=True))
    torch.save(hooked_tensors(lively(SHAPE, 4)), folder / "hooked_transformer.pt")
    assert "in no order are they those of hooked_transformer.pt" in refusal(folder)
    assert read_decoder(folder, qkv="blocks", gate_up="gate-first").model.shape == SHAPE
    assert "fused_qkv is 'kqv'; it is blocks or per-head" in refusal(folder, qkv="kqv")


@torch.no_grad()
@pytest.mark.parametrize("grouped", [False, True], ids=["all heads", "grouped queries"])
def test_a_hooked_transformer_bundle_is_read_bare_or_wrapped_with_its_config(tokens, folder, grouped):
    model = lively(replace(SHAPE, n_kv_heads=2 if grouped else 4), 3)
    tensors, path = hooked_tensors(model), folder / "hooked_transformer.pt"
    config = {
        "n_layers": 2, "n_heads": 4, "d_model": 32, "d_head": 8, "d_mlp": 64, "d_vocab": 53, "n_ctx": 40, "eps": 1e-6,
        "act_fn": "silu", "normalization_type": "RMS", "gated_mlp": True, "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False, "rotary_dim": 8, "rotary_base": 10000,
    }  # fmt: skip
    if grouped:
        config["n_key_value_heads"] = 2
    else:
        torch.save(tensors, path)
        torch.testing.assert_close(load_decoder(folder)(tokens), model(tokens))
    (folder / "config.json").unlink()
    torch.save({"config": config, "state_dict": OrderedDict(tensors)}, path)
    torch.testing.assert_close(load_decoder(folder)(tokens), model(tokens))
    torch.testing.assert_close(load_decoder(path)(tokens), model(tokens))
    torch.save({"cfg": {**config, "act_fn": "gelu"}, "model": tensors}, path)
    assert "act_fn 'gelu', which is no Llama" in refusal(folder)
    torch.save(tensors, path)
    assert "put the release's config.json there" in refusal(folder)


class Explosive:
    def __reduce__(self):
        return (pytest.fail, ("the bundle was unpickled",))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"state_dict": {"a": torch.ones(2)}, "config": Explosive()}, "more than tensors and plain containers"),
        ({"config": Path("a")}, "more than tensors and plain containers"),
        ([torch.ones(2)], "holds a list"),
        ({"epoch": 3}, "holds no named tensors, but epoch"),
    ],
)
def test_a_bundle_of_other_things_is_refused_and_never_unpickled(folder, content, told):
    torch.save(content, folder / "model.pt")
    assert told in refusal(folder)


def test_a_plain_pickle_and_a_cut_bundle_are_refused(model, folder):
    path = folder / "model.pt"
    path.write_bytes(pickle.dumps(Explosive(), protocol=4))
    assert str(path) in refusal(folder)
    torch.save(written(model, NAMES["nano"], fuse=False), path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "no whole file of torch.save" in refusal(folder)


def test_of_several_bundles_one_must_be_named(model, tokens, folder):
    torch.save(written(model, NAMES["nano"], fuse=False), folder / "last.pt")
    torch.save(written(lively(SHAPE, 4), NAMES["nano"], fuse=False), folder / "best.pt")
    assert "several weight files (best.pt, last.pt)" in refusal(folder)
    assert torch.equal(load_decoder(folder / "last.pt")(tokens), model(tokens))


def test_the_published_config_is_the_released_shape(tmp_path):
    from sae_steer.model.loading.interpgpt import interpgpt_shape

    published = {**CONFIG, "vocab_size": 8197, "max_seq_len": 512, "n_layers": 6, "n_heads": 8, "d_model": 512,
                 "d_ff": 2048, "pad_id": 8196, "pad_token_id": 8196}  # fmt: skip
    assert asdict(interpgpt_shape(tmp_path, published)) == asdict(PRESETS["interpgpt-23m"])
