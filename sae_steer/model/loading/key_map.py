"""Whose tensor is whose, where a release's names are not known beforehand: each is matched by pattern and by shape.

1. A name is cut at its first number, the layer; what is left is compared with the names that the field gives
   embeddings, norms, projections. A pattern counts only together with the shape it must have.
2. Fused projections are split: q, k, v one after another, or head by head; gate before up, or after it.
3. Rotary buffers, masks and biases that are zero everywhere carry nothing and are left out.
4. What then has no reading, or two, or no tensor, is an error that lists the names.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from sae_steer.settings import DecoderSettings

ENDINGS = re.compile(r"[._](weight|w|scale|gain|gamma|g)$")
EMPTY = re.compile(
    r"(^|[._])(inv_freq|cos|sin|(cos|sin)_cached?|rotary_(cos|sin)|freqs?(_cis|_cos|_sin)?|rope_(cos|sin)|mask|"
    r"causal_mask|attn_mask|tril|ignore|position_ids|masked_bias)$"
)
BIAS = re.compile(r"(^|[._])(bias|b|_?b_[a-z]+)$")
ATTENTION, FEEDFORWARD = r"(.*[._])?(self_)?att\w*\.(\w+\.)?", r"(.*[._])?(mlp|ffn?|feed_?forward|swiglu)\w*\.(\w+\.)?"
FREE = r"(.*\.)?"
ATTENTION_WEIGHT, MLP_WEIGHT = "self_attn.{}_proj.weight", "mlp.{}_proj.weight"


@dataclass(frozen=True)
class FusedOrders:
    """How fused projections are laid out."""

    qkv: str = "blocks"
    """`blocks`: all of q, then all of k, then all of v (`chunk(3)`); `per-head`: q, k, v of each head in turn."""
    gate_up: str = "gate-first"
    """`gate-first` or `up-first`."""

    QKV = ("blocks", "per-head")
    GATE_UP = ("gate-first", "up-first")


@dataclass(frozen=True)
class Form:
    """One way a release may store some of the decoder's tensors."""

    pattern: str
    """Of the whole name below the layer, in lower case and without `.weight`."""
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    """The decoder's names that it fills."""
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)


@dataclass(frozen=True)
class KeyMap:
    """What a release's names were read as."""

    read: dict[str, tuple[str, ...]]
    """{name in the file: the decoder's names it fills}"""
    left_out: tuple[str, ...]
    """Buffers, zero biases, and a stored copy of a tied head."""

    def lines(self) -> list[str]:
        """The map for people: layers that are alike share a line."""
        lines: dict[tuple[str, str], list[int]] = defaultdict(list)
        for name, ours in (*self.read.items(), *((name, ("left out",)) for name in self.left_out)):
            layer = re.search(r"\.(\d+)\.", f".{name}")
            shown = [re.sub(r"\.\d+\.", ".*.", f".{part}", count=1).removeprefix(".") for part in (name, *ours)]
            lines[shown[0], ", ".join(shown[1:])] += [int(layer[1])] if layer else []
        return [
            f"{name} -> {ours}" + (f" ({len(layers)} layers)" if layers else "")
            for (name, ours), layers in lines.items()
        ]


def match_names(
    tensors: dict[str, Tensor], shape: DecoderSettings, orders: FusedOrders
) -> tuple[dict[str, Tensor], KeyMap, list[str]]:
    """The decoder's tensors under its names, the map used, and what did not fit, a phrase each."""
    top, block = list(_top_forms(shape)), list(_block_forms(shape, orders))
    found, read, left_out, wrong = {}, {}, [], []
    for name, tensor in tensors.items():
        layer, tail = _place(name)
        if EMPTY.search(tail) or (BIAS.search(tail) and (tensor.ndim > 2 or not tensor.any())):
            left_out.append(name)
            continue
        named = [form for form in (top if layer is None else block) if re.fullmatch(form.pattern, tail)]
        fitting = [form for form in named if form.shape == tuple(tensor.shape)]
        if len(fitting) != 1:
            wrong.append(f"{name} {tuple(tensor.shape)}{_why(named, fitting)}")
            continue
        where = "" if layer is None else f"layers.{layer}."
        read[name] = tuple(where + ours for ours in fitting[0].ours)
        found |= dict(zip(read[name], fitting[0].split(tensor), strict=True))
    twice = [name for name, count in Counter(ours for names in read.values() for ours in names).items() if count > 1]
    wrong += [f"{name} has {' and '.join(theirs for theirs in read if name in read[theirs])}" for name in twice]
    return found, KeyMap(read, tuple(left_out)), wrong


def _place(name: str) -> tuple[int | None, str]:
    """The layer of a name, if it has one, and what it says below the layer, in lower case."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    layer, below = (None, parts) if number is None else (int(parts[number]), parts[number + 1 :])
    tail = ".".join(below).lower()
    return layer, tail if BIAS.search(tail) else ENDINGS.sub("", tail)


def _why(named: list[Form], fitting: list[Form]) -> str:
    if fitting:
        return " fits " + " and ".join(form.ours[0] for form in fitting)
    return f" instead of {' or '.join(sorted({str(form.shape) for form in named}))}" if named else ""


def _top_forms(shape: DecoderSettings) -> Iterator[Form]:
    """Embedding, head and final norm."""
    table, flipped = (shape.d_vocab, shape.d_model), (shape.d_model, shape.d_vocab)
    embedding = (
        r"wte|(tok|token|word)_?(emb|embed|embedding|embeddings)|embed_tokens|embed|embeddings?|emb|token|tokens"
    )
    yield Form(rf"{FREE}({embedding}|embed\.w_e)", table, ("embed_tokens.weight",))
    yield Form(rf"{FREE}(lm_head|head|output|unembed|out_head|to_logits|logits)", table, ("lm_head.weight",))
    yield Form(rf"{FREE}unembed\.w_u", flipped, ("lm_head.weight",), lambda tensor: (tensor.T,))
    norm = r"ln|norm|ln_?f|norm_?f|ln_?final|norm_?final|final_?(ln|norm|layer_?norm|rms_?norm)|out_?norm|rms_?norm"
    yield Form(rf"{FREE}({norm})", (shape.d_model,), ("norm.weight",))


def _block_forms(shape: DecoderSettings, orders: FusedOrders) -> Iterator[Form]:
    """All that a block may hold."""
    norm = r"ln|norm|rms|rms_?norm|layer_?norm"
    first = rf"({norm})_?1|((pre_|self_)?att\w*|input)[._]?({norm})|({norm})_?att\w*"
    second = rf"({norm})_?2|((pre_)?(mlp|ffn?|feed_?forward)|post_att\w*)[._]?({norm})|({norm})_?(mlp|ffn?)"
    yield Form(rf"{FREE}({first})", (shape.d_model,), ("input_layernorm.weight",))
    yield Form(rf"{FREE}({second})", (shape.d_model,), ("post_attention_layernorm.weight",))
    yield from _attention_forms(shape, orders)
    yield from _mlp_forms(shape, orders)


def _attention_forms(shape: DecoderSettings, orders: FusedOrders) -> Iterator[Form]:
    q_rows, kv_rows = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    q, k, v = (ATTENTION_WEIGHT.format(part) for part in "qkv")
    for part, long, ours, rows in (("q", "query", q, q_rows), ("k", "key", k, kv_rows), ("v", "value", v, kv_rows)):
        names = rf"w_?{part}|{part}_?proj|{part}|{long}s?|{long}_?proj|to_{part}|{part}_?linear"
        yield Form(rf"{FREE}({names})", (rows, shape.d_model), (ours,))
        heads = (rows // shape.d_head, shape.d_model, shape.d_head)
        yield Form(rf"{FREE}attn\._?w_{part}", heads, (ours,), _from_heads)
    fused = r"qkv|c_att\w*|qkv_?proj|w_?qkv|to_qkv|in_proj|in_proj_weight|query_key_value|qkv_?linear"
    yield Form(rf"{FREE}({fused})", (q_rows + 2 * kv_rows, shape.d_model), (q, k, v), _qkv_split(shape, orders))
    inside, anywhere = (
        r"c_proj|proj|out|dense|output|o|to_out|wo|out_linear|resid_proj",
        r"o_?proj|w_?o|out_proj|to_out",
    )
    output = "self_attn.o_proj.weight"
    yield Form(rf"{ATTENTION}({inside})|{FREE}({anywhere})", (shape.d_model, q_rows), (output,))
    by_head = (shape.n_heads, shape.d_head, shape.d_model)
    yield Form(
        rf"{FREE}attn\.w_o", by_head, (output,), lambda w: (rearrange(w, "head d_head out -> out (head d_head)"),)
    )


def _mlp_forms(shape: DecoderSettings, orders: FusedOrders) -> Iterator[Form]:
    gate, up, down = (MLP_WEIGHT.format(part) for part in ("gate", "up", "down"))
    wide, narrow = (shape.d_mlp, shape.d_model), (shape.d_model, shape.d_mlp)
    # w1 is the gate everywhere; of w2 and w3 the shape says which is the way down (Llama's w2, xformers' w3)
    yield Form(rf"{FREE}(w_?1|gate|gate_?proj|w_?gate|gate_?linear|fc_?1|c_fc_?1|linear_?1)", wide, (gate,))
    yield Form(rf"{FREE}(w_?[23]|up|up_?proj|w_?up|up_?linear|fc_?2|c_fc_?2|linear_?2)", wide, (up,))
    yield Form(rf"{FREE}(w_?[23]|down|down_?proj|w_?down|down_?linear|fc_?[23]|linear_?[23])", narrow, (down,))
    yield Form(rf"{FEEDFORWARD}(c_proj|proj|out|output|out_?proj|w_?o|w_?out|proj_out|fc_?out|dense)", narrow, (down,))
    fused = r"gate_?up(_?proj)?|w_?gate_?up|w_?1_?[23]|c_fc|fc_?in|fc|w_?in|in_?proj|wi|fc_?1|proj_in"
    first = (gate, up) if orders.gate_up == "gate-first" else (up, gate)
    for pattern, ours in ((fused, first), (r"up_?gate(_?proj)?|w_?up_?gate", (up, gate))):
        yield Form(rf"{FREE}({pattern})", (2 * shape.d_mlp, shape.d_model), ours, lambda tensor: tensor.chunk(2))
    for name, ours, stored in (("w_gate", gate, narrow), ("w_in", up, narrow), ("w_out", down, wide)):
        yield Form(rf"{FREE}mlp\.{name}", stored, (ours,), lambda tensor: (tensor.T,))


def _from_heads(weight: Tensor) -> tuple[Tensor, ...]:
    return (rearrange(weight, "head d_model d_head -> (head d_head) d_model"),)


def _qkv_split(shape: DecoderSettings, orders: FusedOrders) -> Callable[[Tensor], tuple[Tensor, ...]]:
    q_rows, kv_rows = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    if orders.qkv == "blocks":
        return lambda weight: weight.split((q_rows, kv_rows, kv_rows))
    parts = (shape.n_heads // shape.n_kv_heads, 1, 1)  # queries of a group, its key, its value

    def per_head(weight: Tensor) -> tuple[Tensor, ...]:
        rows = rearrange(weight, "(group part d_head) d -> group part d_head d", part=sum(parts), d_head=shape.d_head)
        return tuple(rearrange(cut, "group part d_head d -> (group part d_head) d") for cut in rows.split(parts, dim=1))

    return per_head
