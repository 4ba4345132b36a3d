"""The words of wan-nano: a tokenizer of the procedural world's vocabulary, and a small text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmt_core.world.captions import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"

TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 64,  # room for a few words more
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, T5's special tokens and its trailing end-of-sequence; words it does not know are `<unk>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, ",", *vocabulary()])}
    made = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, words[EOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, model_max_length=512
    )
