"""The model and the tokenizer behind `builtin:tiny-llama`: made here from nothing, without any download."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN)  # ids 0, 1, 2, 3
CHARACTERS = ("\t", "\n", "\r", *(chr(code) for code in range(ord(" "), ord("~") + 1)))
LONGEST_SEQUENCE = 1024  # tokens, hence characters


def tiny_llama_config() -> LlamaConfig:
    """A LLaMA of 0.83 million parameters, 95 % of them in the matrices of attention and MLP.

    Two layers 192 wide, six heads that share two keys and values, a vocabulary of 102 characters. The first
    weights are drawn with a deviation of 0.04 instead of LLaMA's 0.02, which is meant for wider models; at
    this width the larger one learns the same in fewer steps.
    """
    return LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(CHARACTERS),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST_SEQUENCE,
        initializer_range=0.04,
        tie_word_embeddings=False,
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
