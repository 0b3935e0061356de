"""The model and the tokenizer behind `builtin:tiny-llama`: made here from nothing, without any download."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowmem.hf.builtin_config import CHARACTERS, LONGEST_SEQUENCE, SPECIAL_TOKENS, TINY_LLAMA

PAD, BOS, EOS, UNKNOWN = SPECIAL_TOKENS


def tiny_llama_config() -> LlamaConfig:
    """The configuration behind `builtin:tiny-llama`."""
    shape = {name: value for name, value in TINY_LLAMA.items() if name != "model_type"}
    return LlamaConfig(
        **shape,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )


def character_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each printable ASCII character, tab and line end; any other character is `<unk>`.

    It adds no token by itself and has no chat template. Decoding gives back every ASCII text unchanged.
    A text that spells out a special token, such as `</s>`, holds that token, as with other tokenizers.
    """
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    # Byte-pair encoding without a single merge leaves characters, and keeps blanks and line ends as they are.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=LONGEST_SEQUENCE,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
