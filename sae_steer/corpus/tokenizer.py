"""Text to token ids and back: byte-level BPE of a fixed number of rows, then the five special tokens.

Rows 0 to `merges_vocab` - 1 are bytes and merges; the specials follow in the order of `SPECIALS`, pad last.
Where the corpus has no more merges to give, rows are filled with tokens that no text can produce. Text a user
typed is encoded with the specials switched off: `<|sep|>` in a title is seven characters, not a delimiter.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from sae_steer.corpus.plans import PAD, SPECIAL_PATTERN, SPECIALS, STEPS, TASK
from sae_steer.corpus.spans import TokenizedText, spans_of_ids
from sae_steer.errors import InputError

UNUSED = " unused "
"""Begins the filler rows: byte-level BPE writes a space as another character, so no text gives one."""


class PlanTokenizer:
    """A tokenizer.json and what the project asks of it; made by `train` or `load`.

    With `template`, texts get what the tokenizer itself puts around them, such as `<s>` before; ours have none.
    """

    def __init__(self, content: str, *, template: bool = False) -> None:
        self.content, self.template = content, template
        exact = _with_whole_offsets(content)
        self._parsing = Tokenizer.from_str(exact)
        self._literal = Tokenizer.from_str(exact)
        for tokenizer in (self._parsing, self._literal):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._literal.encode_special_tokens = True

    @classmethod
    def train(cls, texts: Iterable[str], *, merges_vocab: int) -> "PlanTokenizer":
        """The BPE of `texts`, cut at special tokens so that no merge crosses one; `merges_vocab` + 5 rows."""
        alphabet = ByteLevel.alphabet()
        if merges_vocab < len(alphabet):
            raise InputError(f"merges_vocab is {merges_vocab}; bytes alone need {len(alphabet)} rows")
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=True)
        tokenizer.decoder = ByteLevelDecoder(add_prefix_space=False, trim_offsets=False, use_regex=True)
        trainer = BpeTrainer(vocab_size=merges_vocab, initial_alphabet=sorted(alphabet), show_progress=False)
        pieces = (piece for text in texts for piece in SPECIAL_PATTERN.split(text) if piece not in SPECIALS)
        tokenizer.train_from_iterator(pieces, trainer)

        facts = json.loads(tokenizer.to_str())
        vocabulary = facts["model"]["vocab"]
        vocabulary.update({f"{UNUSED}{row}": row for row in range(len(vocabulary), merges_vocab)})
        filled = Tokenizer.from_str(json.dumps(facts))
        filled.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
        return cls(filled.to_str(pretty=True))

    @classmethod
    def load(cls, path: Path, *, template: bool = False) -> "PlanTokenizer":
        """The tokenizer in a tokenizer.json, ours or another model's; JSON is read, nothing unpickled."""
        try:
            content = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise InputError(f"cannot read tokenizer {path}: {error.strerror}; give a tokenizer.json") from error
        except UnicodeDecodeError as error:
            raise InputError(f"tokenizer {path} is not UTF-8 text; give a tokenizer.json") from error
        return cls.read(content, str(path), template=template)

    @classmethod
    def read(cls, content: str, origin: str, *, template: bool = False) -> "PlanTokenizer":
        """The tokenizer of a tokenizer.json's content; `origin` names it in an error."""
        try:
            tokenizer = cls(content, template=template)
            dropout = json.loads(content)["model"].get("dropout")
        except Exception as error:  # tokenizers raises no narrower type
            raise InputError(f"{origin} is no tokenizer.json ({error}); give one saved by `tokenizers`") from error
        if dropout:
            raise InputError(
                f"{origin} has dropout {dropout}: it reads one text as other ids every time; set model.dropout to null"
            )
        return tokenizer

    def save(self, path: Path) -> Path:
        """Write the tokenizer.json, beside and renamed; returns `path`."""
        from sae_steer.files import replacing

        with replacing(path) as scratch:
            scratch.write_bytes(self.content.encode("utf-8"))
        return Path(path)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text of ours, whose special tokens are delimiters."""
        return self._parsing.encode(_in_utf8(text), add_special_tokens=self.template).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        valid = [_in_utf8(text) for text in texts]
        return [row.ids for row in self._parsing.encode_batch_fast(valid, add_special_tokens=self.template)]

    def encode_text(self, user_text: str) -> list[int]:
        """Token ids of words a user typed: nothing in them is a delimiter."""
        return self._literal.encode(_in_utf8(user_text), add_special_tokens=False).ids

    def encode_prompt(self, title: str) -> list[int]:
        """`<|task|>` title `<|steps|>`: what a model continues with a plan."""
        return [self.token_id(TASK), *self.encode_text(title), self.token_id(STEPS)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens spelled out."""
        return self._parsing.decode(list(ids), skip_special_tokens=False)

    def tokenized(self, text: str) -> TokenizedText:
        """A text of ours, the ids `encode` gives, and the characters each of them covers."""
        return TokenizedText.of(text, self._parsing.encode(_in_utf8(text), add_special_tokens=self.template))

    def detokenized(self, ids: Sequence[int]) -> TokenizedText:
        """What `decode` makes of `ids`, and the characters each of them covers."""
        return spans_of_ids([int(token) for token in ids], self._parsing)

    def can_make(self, user_text: str) -> bool:
        """Whether the text's ids stand for it, and not for something unknown."""
        ids = self.encode_text(user_text)
        return self._unknown_id not in ids and self.encode_text(self.decode(ids)) == ids

    @cached_property
    def _unknown_id(self) -> int | None:
        model = json.loads(self.content)["model"]
        named = model.get("unk_token")
        return self._parsing.token_to_id(named) if isinstance(named, str) else model.get("unk_id")

    def token_id(self, token: str) -> int:
        """The id of a token of the vocabulary, such as `<|sep|>`."""
        found = self._parsing.token_to_id(token)
        if found is None:
            raise InputError(f"the tokenizer has no token {token!r}; it has {self._names}")
        return found

    def disagreements(self, other: "PlanTokenizer") -> list[int]:
        """Ids that both vocabularies have and give to different tokens; further rows in one of them are none."""
        ours, theirs = (
            {row: token for token, row in each._parsing.get_vocab(with_added_tokens=True).items()}
            for each in (self, other)
        )
        return sorted(row for row in ours.keys() & theirs.keys() if ours[row] != theirs[row])

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self._parsing.get_added_tokens_decoder()

    @property
    def _names(self) -> str:
        names = [token.content for token in self._added.values() if token.special]
        return "the special tokens " + ", ".join(names[:8]) if names else "no special tokens"

    @cached_property
    def specials(self) -> dict[str, int]:
        """Ids of those of the five special tokens that the vocabulary has."""
        found = {token: self._parsing.token_to_id(token) for token in SPECIALS}
        return {token: row for token, row in found.items() if row is not None}

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of every special token, another model's own included: no step reaches across one, but across what the
        tokenizer does not know.
        """
        return frozenset(row for row, token in self._added.items() if token.special and row != self._unknown_id)

    @property
    def pad_id(self) -> int | None:
        """The id of `<|pad|>`, or None in another model's vocabulary."""
        return self.specials.get(PAD)

    @cached_property
    def n_vocab(self) -> int:
        """Rows of the vocabulary, specials and fillers included."""
        return self._parsing.get_vocab_size(with_added_tokens=True)

    @cached_property
    def unused(self) -> int:
        """Filler rows: those the corpus gave no merge for."""
        return sum(token.startswith(UNUSED) for token in self._parsing.get_vocab())

    @cached_property
    def sha256(self) -> str:
        """The fingerprint of the tokenizer.json that `save` writes, and of whether texts get its template."""
        return hashlib.sha256(self.content.encode("utf-8") + b"+template" * self.template).hexdigest()


def _with_whole_offsets(content: str) -> str:
    """The same tokenizer.json, its offsets not trimmed of the white space a token has: ids do not depend on it."""
    facts = json.loads(content)
    return json.dumps(facts | {"post_processor": _untrimmed(facts.get("post_processor"))})


def _untrimmed(processor: object) -> object:
    if isinstance(processor, dict):
        return {key: False if key == "trim_offsets" else _untrimmed(value) for key, value in processor.items()}
    return [_untrimmed(one) for one in processor] if isinstance(processor, list) else processor


def _in_utf8(text: str) -> str:
    """The text itself; half of a surrogate pair is no character that any tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start} of {text[:20]!r} is {text[error.start]!r}, half of a surrogate pair, which no "
            "tokenizer reads; take it out"
        ) from error
    return text
