"""Tiny random models with tokenizers trained on the spot: quick to make and reproducible.

Weights are drawn with a deviation of 0.3 instead of 0.02, so that answers depend on the prompt.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CORPUS = (
    "Please solve the following problem. Rules: if the apple is red, then the apple is sweet.",
    "Question: Is 24 even or odd?\nA. Even\nB. Odd\nAnswer: A\n",
    "Passage: water boils. Query: when? Does the passage answer the query? Answer: Yes No",
    "Grüße aus Zürich, naïve café. 你好, мир. The “quoted” word ends; the next begins: 0 1 2 3 4 5 6 7 8 9",
    "( ( [ ] ) ) { } + - * / = <one> two, three: four",
)


def copy_with_template(model: Path, folder: Path, template: str) -> Path:
    """Copy a saved model to a new folder and give it a chat template; returns the folder."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def save_tiny_opt(folder: Path, positions: int = 256, vocab: int = 384) -> Path:
    """Save a random OPT with a byte-level BPE tokenizer that begins texts with ``</s>``, as OPT's does.

    Args:
        positions: length of the window in tokens.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    config = OPTConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=positions,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
        init_std=0.3,
    )
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_llama(folder: Path) -> Path:
    """Save a random Llama with the tokenizer of `save_tiny_sentencepiece`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    save_tiny_sentencepiece(folder)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_gpt2(folder: Path) -> Path:
    """Save a random GPT-2 with a byte-level tokenizer that puts nothing before a text."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = bare_byte_level_tokenizer()
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def bare_byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in the style of GPT-2: one token per byte, an end-of-text token, nothing before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<|endoftext|>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def save_tiny_sentencepiece(folder: Path) -> Path:
    """Save a SentencePiece-style tokenizer like Llama's: word marks, byte fallback, ``<s>`` in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["the", "apple", "is", "red", "\u2581the", "\u2581apple", "\u2581is", "\u2581red", "\u2581"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = sorted(set("".join(words)))
    pieces = letters + [word for word in words if len(word) > 1]
    vocabulary |= {piece: 259 + index for index, piece in enumerate(pieces)}
    merges = []
    for word in words:
        parts = list(word)
        while len(parts) > 1:
            merged = parts[0] + parts[1]
            if merged not in vocabulary:
                vocabulary[merged] = len(vocabulary)
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts = [merged, *parts[2:]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
