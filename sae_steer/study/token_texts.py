"""Token tensors as a user has them, made the texts of a study: each is taken as what it means, or refused in a line.

1. Tensors, arrays and lists are one; rows of different lengths are texts without padding.
2. Which tokens are real is said by an attention mask, which may pad left or right, or by lengths; without either all
   are, and what looks like padding is refused.
3. Places are a mask, or one or several token indices a text; negative ones count from the text's last token.
4. Texts are divided by cluster: maps are fitted on a quarter, sizes read on a quarter, the verdict rests on the rest.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae_steer.arguments import shown
from sae_steer.errors import InputError
from sae_steer.pair.texts import Text
from sae_steer.randomness import Stream, random_numbers

Numbers = Tensor | np.ndarray | Sequence[object]
"""Whole numbers or a mask, as a tensor, an array or lists."""
SHARES = {"fit": 0.25, "tune": 0.25}
"""Of the clusters; the others confirm."""
SPLITS = {"fit": "fit the maps between the models", "tune": "set sizes", "confirm": "carry the verdict"}


def token_texts(
    tokens: Numbers,
    positions: Numbers | int,
    *,
    d_vocab: int,
    lengths: Numbers | None = None,
    attention_mask: Numbers | None = None,
    clusters: Numbers | None = None,
    target: Sequence[int] = (),
    seed: int = 0,
) -> list[Text]:
    """The texts with their marked positions, divided by cluster, padding cut off.

    Args:
        d_vocab: ids that both models have.
        target: the ids that count as the behaviour, for what follows a marked token.
    """
    ids, ragged = _rectangle("tokens", tokens, fill=0)
    if lengths is None and attention_mask is None:
        lengths = ragged
        if ragged is None:
            _refuse_padding(ids)
    real = _real(ids, lengths, attention_mask)
    _check_ids(ids, real, d_vocab)
    marked = _marks(positions, real)
    task = _clusters(clusters, len(ids))
    splits = _splits(task, seed)
    texts = []
    for number, row in enumerate(real):
        token, here = ids[number][row].numpy(), marked[number][row].numpy()
        follows = np.append(np.isin(token[1:], list(target)), False)
        texts.append(
            Text(
                prompt=number,
                task=int(task[number]),
                rendering=0,
                split=splits[int(task[number])],
                token=token,
                is_onset=here,
                step=np.where(here, 0, -1),
                next_is_target=here & follows,
                true_p=np.full(len(token), np.nan),
            )
        )
    _check_marked(texts)
    return texts


def _rectangle(name: str, values: Numbers, *, fill: int) -> tuple[Int[Tensor, "text pos"], Int[Tensor, " text"] | None]:
    """Whole numbers [text, pos], and how long each row was where they differed."""
    if (
        isinstance(values, Sequence)
        and values
        and all(isinstance(row, Sequence | np.ndarray | Tensor) for row in values)
    ):
        sizes = [len(row) for row in values]
        if len(set(sizes)) > 1:
            rows = [[*map(int, row), *[fill] * (max(sizes) - len(row))] for row in values]
            return _whole(name, rows, 2), torch.tensor(sizes)
    return _whole(name, values, 2), None


def _whole(name: str, values: Numbers, axes: int) -> Int[Tensor, "..."]:
    """Whole numbers of so many axes."""
    try:
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{name} is {shown(values)}; give whole numbers as a tensor, an array or lists") from None
    if tensor.is_floating_point() or tensor.is_complex():
        raise InputError(f"{name} is {shown(tensor)}; give whole numbers")
    if tensor.ndim != axes or not tensor.numel():
        meant = "[text, pos], one row a text" if axes == 2 else "[text], one number a text"
        raise InputError(f"{name} is {shown(tensor)}; give {meant}")
    return tensor.long()


def _refuse_padding(ids: Int[Tensor, "text pos"]) -> None:
    """Rows that begin, or end, with a run of one token that others begin or end with too look padded."""
    for side, rows in (("begin", ids), ("end", ids.flip(1))):
        runs = (rows == rows[:, :1]).long().cumprod(1).sum(1)
        for token in rows[runs > 1, 0].unique().tolist():
            padded = (rows[:, 0] == token) & (runs > 1)
            only_there = int((ids == token).sum()) == int(runs[rows[:, 0] == token].sum())
            if int(padded.sum()) > 1 and (only_there or side == "begin"):
                raise InputError(
                    f"{int(padded.sum())} of {len(ids)} texts {side} with several tokens {token}, which looks like "
                    f"padding on the {'left' if side == 'begin' else 'right'}; say which tokens are real: "
                    "attention_mask= for padding on either side, or lengths= for right-padded texts"
                )


def _real(
    ids: Int[Tensor, "text pos"], lengths: Numbers | None, attention_mask: Numbers | None
) -> Bool[Tensor, "text pos"]:
    """Which tokens are no padding: in every row some, one after another."""
    places = torch.arange(ids.shape[1])
    if lengths is not None and attention_mask is not None:
        raise InputError("lengths and attention_mask both say which tokens are real; give one of them")
    if attention_mask is not None:
        mask = _mask("attention_mask", _rectangle("attention_mask", attention_mask, fill=0)[0], ids)
        first, last = mask.long().argmax(1), ids.shape[1] - 1 - mask.flip(1).long().argmax(1)
        between = (places >= first[:, None]) & (places <= last[:, None])
        if not mask.any(1).all() or (between != mask).any():
            row = int((~mask.any(1) | (between != mask).any(1)).long().argmax())
            raise InputError(f"attention_mask of text {row} marks no run of tokens; 1 for the text's, 0 around it")
        return mask
    if lengths is None:
        return torch.ones_like(ids, dtype=torch.bool)
    ends = _whole("lengths", lengths, 1)
    if len(ends) != len(ids) or not ((ends >= 1) & (ends <= ids.shape[1])).all():
        raise InputError(
            f"lengths are {len(ends)} from {ends.min()} to {ends.max()}, and there are {len(ids)} texts of 1 to "
            f"{ids.shape[1]} tokens; give the number of real tokens of each"
        )
    return places < ends[:, None]


def _mask(name: str, values: Int[Tensor, "..."], ids: Int[Tensor, "text pos"]) -> Bool[Tensor, "text pos"]:
    if values.shape != ids.shape:
        raise InputError(f"tokens are {tuple(ids.shape)} and {name} {tuple(values.shape)}; mark every token")
    if not ((values == 0) | (values == 1)).all():
        raise InputError(f"{name} holds numbers other than 0 and 1; give a mask, True or 1 where a token is marked")
    return values.bool()


def _check_ids(ids: Int[Tensor, "text pos"], real: Bool[Tensor, "text pos"], d_vocab: int) -> None:
    strange = ((ids < 0) | (ids >= d_vocab)) & real
    if strange.any():
        row, at = strange.nonzero()[0].tolist()
        raise InputError(
            f"token {int(ids[row, at])} of text {row} at position {at} is no id of both models, which have 0 to "
            f"{d_vocab - 1}; if it is padding, say which tokens are real with attention_mask= or lengths="
        )


def _marks(positions: Numbers | int, real: Bool[Tensor, "text pos"]) -> Bool[Tensor, "text pos"]:
    """The places to edit and read; marks on padding mark nothing."""
    width = real.shape[1]
    if isinstance(positions, int) and not isinstance(positions, bool):
        return _indexed(torch.full((len(real), 1), positions), real)
    values = torch.as_tensor(positions) if isinstance(positions, Tensor | np.ndarray) else None
    if values is None:
        flat = isinstance(positions, Sequence) and not any(isinstance(row, Sequence) for row in positions)
        values = _whole("positions", positions, 1) if flat else _rectangle("positions", positions, fill=0)[0]
        is_mask = _all_booleans(positions)
    else:
        is_mask = values.dtype == torch.bool
        values = _whole("positions", values, 1 if values.ndim == 1 else 2)
    if is_mask or tuple(values.shape) == tuple(real.shape):
        return _mask("positions", values, torch.zeros_like(real, dtype=torch.long)) & real
    if len(values) != len(real):
        raise InputError(
            f"positions are {list(values.shape)} and tokens {list(real.shape)}; give a mask of the tokens' shape, or "
            f"indices from 0 to {width - 1} for each text"
        )
    return _indexed(values.reshape(len(real), -1), real)


def _all_booleans(values: Sequence) -> bool:
    return all(isinstance(value, bool) or (isinstance(value, Sequence) and _all_booleans(value)) for value in values)


def _indexed(places: Int[Tensor, "text place"], real: Bool[Tensor, "text pos"]) -> Bool[Tensor, "text pos"]:
    """A mask of token indices; negative ones count from the last real token."""
    last = real.shape[1] - 1 - real.flip(1).long().argmax(1)
    at = torch.where(places < 0, last[:, None] + 1 + places, places)
    inside = (at >= 0) & (at < real.shape[1])
    inside &= real.gather(1, at.clamp(0, real.shape[1] - 1))
    if not inside.all():
        row, which = (~inside).nonzero()[0].tolist()
        raise InputError(
            f"position {int(places[row, which])} of text {row} is none of its {int(real[row].sum())} tokens; give "
            "indices of real tokens, or a mask of the tokens' shape"
        )
    return torch.zeros_like(real).scatter(1, at, True)


def _clusters(clusters: Numbers | None, count: int) -> np.ndarray:
    """A number a text; names become numbers in their order."""
    if clusters is None:
        return np.arange(count)
    named = clusters.cpu().numpy() if isinstance(clusters, Tensor) else np.asarray(clusters)
    if named.shape != (count,) or named.dtype.kind not in "iubUS":
        raise InputError(
            f"clusters are {shown(named)}, and there are {count} texts; give a whole number or a name each"
        )
    return named if named.dtype.kind in "iu" else np.unique(named, return_inverse=True)[1]


def _splits(task: np.ndarray, seed: int) -> dict[int, str]:
    """{cluster: its split}."""
    shuffled = random_numbers(seed, Stream.CLUSTER_SPLITS).permutation(np.unique(task)).tolist()
    fit, tune = (round(share * len(shuffled)) for share in SHARES.values())
    if not fit or not tune or len(shuffled) == fit + tune:
        raise InputError(
            f"the texts are of {len(shuffled)} cluster{'s' * (len(shuffled) > 1)}; a quarter of them fits maps, a "
            "quarter sets sizes and half carries the verdict: give 60 clusters at least, 200 for a null"
        )
    return {name: "fit" if i < fit else "tune" if i < fit + tune else "confirm" for i, name in enumerate(shuffled)}


def _check_marked(texts: Sequence[Text]) -> None:
    if not any(text.is_onset.any() for text in texts):
        raise InputError("positions marks no token; mark those to edit and read")
    for split, does in SPLITS.items():
        if not any(text.is_onset.any() for text in texts if text.split == split):
            raise InputError(f"positions marks no token in the texts that {does}; mark some in every cluster")
