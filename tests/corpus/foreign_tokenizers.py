"""Tokenizers of every common family, trained in memory, with a `<s>` before the text where their kind has one."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "Dish\n- Chop it\n- Taste it\n切る、味見。",
    "Soup ; Heat the pan ; Stir\u3000味 » नमस्ते » Привет",
    "Step|مرحبا|שלום|é|e\u0301",
] * 9
BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def byte_fallback() -> Tokenizer:
    """As Llama 1 and 2, Mistral and Gemma: characters out of the vocabulary become byte tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(TEXT[:1] * 9, trainer)
    facts = json.loads(tokenizer.to_str())
    facts["added_tokens"] = facts["added_tokens"][:2]  # byte tokens are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(facts))
    tokenizer.post_processor = BOS
    return tokenizer


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen, which trim the offsets of a token that begins with a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<unk>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), BOS])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT: lower case, no accents, white space dropped, `[SEP]` put after the text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 and XLM-R: SentencePiece's unigram pieces over Metaspace, normalised by NFKC."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = BOS
    return tokenizer


FAMILIES = {"byte fallback": byte_fallback, "byte level": byte_level, "WordPiece": word_piece, "unigram": unigram}
