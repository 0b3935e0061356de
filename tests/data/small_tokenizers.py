"""Tokenizers built on the spot, one for each way real ones treat the beginning and the seams of a text."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SENTENCES = [
    "Once upon a time there was a small cat.\n\nThe cat said: hello, hello!\n",
    "What is 12 + 30?\nThe answer is 42.\nAnswer: 42\n\nQuestion: why?\n",
    "user\nHello there, how are you?\nassistant\n\nI am well, thank you.\n  Good bye  \n",
    "<|im_end|>\n<|im_start|>user\n[INST] Hello [/INST] Hello ### Response:\nHello\n",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _byte_level(
    *, special: list[str], use_regex: bool = True, normalizer: normalizers.Normalizer | None = None
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


@cache
def byte_level() -> PreTrainedTokenizerBase:
    """GPT-2's kind: words split by a pattern, no beginning token."""
    tokenizer = _byte_level(special=["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@cache
def byte_level_across_words() -> PreTrainedTokenizerBase:
    """No pattern, so that it merges a newline or a mark with the letters beside it."""
    tokenizer = _byte_level(special=["<eos>"], use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@cache
def chat() -> PreTrainedTokenizerBase:
    """With ChatML's marks as special tokens and a template of its own."""
    tokenizer = _byte_level(special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    found.chat_template = CHATML
    return found


@cache
def composing() -> PreTrainedTokenizerBase:
    """Normalises to NFC, as Qwen's does, and so changes some texts."""
    tokenizer = _byte_level(special=["<eos>"], normalizer=normalizers.NFC())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@cache
def swallowing() -> PreTrainedTokenizerBase:
    """Its end-of-turn token takes the white space behind it along, as Phi-3's does."""
    tokenizer = _byte_level(special=["<eos>"])
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", rstrip=True), AddedToken("<|im_start|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def _with_bytes(words: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of special tokens, bytes, letters and the merges that build each of `words`."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = []
    for letter in [chr(c) for c in range(32, 127)] + ["▁"]:
        vocabulary.setdefault(letter, len(vocabulary))
    for word in words.split():
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    return vocabulary, merges


@cache
def llama() -> PreTrainedTokenizerBase:
    """Llama 2's kind: a space before every text, bytes for unknown characters, adds <s> by itself."""
    vocabulary, merges = _with_bytes("▁Hello ▁Once ▁the ▁cat ▁42 Hello ▁[INST] :▁ ▁▁")
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def metaspace() -> PreTrainedTokenizerBase:
    """SentencePiece's kind in its newer form: a space before the first word of a text only, joined line ends."""
    vocabulary, merges = _with_bytes("▁Hello ▁Once ▁the ▁cat")
    for token in ("\n", "\n\n"):
        vocabulary[token] = len(vocabulary)
    merges.append(("\n", "\n"))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def characters() -> PreTrainedTokenizerBase:
    """One token a character, and one for every character it does not know."""
    letters = sorted({letter for sentence in SENTENCES for letter in sentence})
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>", "<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


EXACT = {  # these give back every text, so an oracle may compare texts to the letter
    "byte_level": byte_level,
    "byte_level_across_words": byte_level_across_words,
    "chat": chat,
    "llama": llama,
    "metaspace": metaspace,
}
