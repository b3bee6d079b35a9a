"""Where each token of a text stands in it, by the tokenizer's own character offsets.

1. Of a text the tokenizer says itself which characters each token covers. Bytes of one character cover it together.
2. Of ids alone the text is what they decode to. Where that text is read as the same ids, its offsets are theirs.
3. Ids that no text is read as (a model's samples may be such) are decoded one after another, each token covering
   what became readable with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tokenizers import Encoding, Tokenizer
from tokenizers.decoders import DecodeStream

Span = tuple[int, int]
"""First character, and the one after the last; equal where a token stands for no character, such as a `<s>` that the
tokenizer put before the text."""


@dataclass(frozen=True)
class TokenizedText:
    """A text, the ids it is read as, and the characters each of them covers."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, text: str, encoding: Encoding) -> "TokenizedText":
        """What the tokenizer says of `text`; a token without characters stands where the one before it ends."""
        spans, end = [], 0
        for span in encoding.offsets:
            end = max(end, span[1])
            spans.append(span if span[0] < span[1] else (end, end))
        return cls(text, tuple(encoding.ids), tuple(spans))


def spans_of_ids(ids: Sequence[int], tokenizer: Tokenizer) -> TokenizedText:
    """The text that `ids` decode to, special tokens spelled out, and where each of them stands in it."""
    ids = tuple(ids)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    again = tokenizer.encode(text, add_special_tokens=False)
    if tuple(again.ids) == ids:
        return TokenizedText.of(text, again)
    return _decoded_one_by_one(ids, tokenizer, text)


def _decoded_one_by_one(ids: tuple[int, ...], tokenizer: Tokenizer, text: str) -> TokenizedText:
    """The tokens that together make a character, or the characters of one piece, share its span."""
    stream, pieces, waiting = DecodeStream(skip_special_tokens=False), [], 0
    try:
        for token in ids:
            piece, waiting = stream.step(tokenizer, token), waiting + 1
            if piece is not None:
                pieces.append((piece, waiting))
                waiting = 0
    except Exception:  # a decoder that takes back what it wrote; tokenizers raises no narrower type
        return TokenizedText(text, ids, _spans_by_prefix(ids, tokenizer))
    whole = "".join(piece for piece, _ in pieces)
    if waiting:
        rest = text.removeprefix(whole) if text.startswith(whole) else ""
        pieces.append((rest, waiting))
    ends = list(accumulate(len(piece) for piece, _ in pieces))
    spans = [(end - len(piece), end) for end, (piece, tokens) in zip(ends, pieces, strict=True) for _ in range(tokens)]
    return TokenizedText("".join(piece for piece, _ in pieces), ids, tuple(spans))


def _spans_by_prefix(ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[Span, ...]:
    """What each prefix adds to the one before; in quadratic time, and so the last resort."""
    lengths = [len(tokenizer.decode(ids[:end], skip_special_tokens=False)) for end in range(len(ids) + 1)]
    ends = list(accumulate(lengths, max))
    return tuple(pairwise(ends))
