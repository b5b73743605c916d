"""Small tokenizers of the kinds that models have: byte-level, byte fallback as Llama 2, SentencePiece unigram."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SAMPLE = ["The cat sat on the mat, and the other cat ran.", "caf\u00e9 na\u00efve \u732b\u304c\u5bdd\u308b"] * 4
BOS, END = "<s>", "</s>"


def byte_level() -> Tokenizer:
    """BPE over bytes, as GPT-2 and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[BOS, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """SentencePiece BPE with a token for each byte, as Llama 2, Mistral 7B and Phi-3. It adds a BOS token."""
    pieces = ["<unk>", BOS, END, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"Tacehomnrstd.,\u00e9"]
    merges = [("\u2581", "c"), ("a", "t"), ("\u2581c", "at"), ("\u2581", "\u2581"), ("h", "e"), ("t", "he")]
    pieces += ["".join(pair) for pair in merges]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    spaces, strip = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<unk>", BOS, END)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return tokenizer


def unigram() -> Tokenizer:
    """SentencePiece unigram with Metaspace, as T5 and XGLM. Characters that it does not know are unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", BOS, END]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


TOKENIZERS = {"byte-level": byte_level, "byte-fallback": byte_fallback, "unigram": unigram}
