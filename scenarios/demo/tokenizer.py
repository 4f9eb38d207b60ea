"""The demo model's tokenizer: a byte-level BPE of 1536 pieces with OPT's special tokens.

Digits, punctuation marks and newlines are single pieces, and a word includes its leading space. So a prompt
and its answer give the same tokens whether they are encoded apart or together, and a newline (HELM's usual
stop string) is always one token. It knows nothing of the model.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from scenarios.tasks import HELM_TASKS, OWN_TASKS
from scenarios.tasks.memos import memo
from scenarios.tasks.words import all_words

VOCAB_SIZE = 1536
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
"""In OPT's order: ids 0 to 3. ``</s>`` begins every text, as in OPT, and would end one."""

_PIECES = r" ?\p{L}+| ?\d| ?[^\s\p{L}\d]|\n|[^\S\n]+"


def train_tokenizer(seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train on prompts of all tasks, on memos, and on every pool word often enough to make it one piece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(random.Random(seed)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return tokenizer


def _corpus(rng: random.Random) -> list[str]:
    texts = [" " + " ".join([word] * 300) for word in all_words()]
    for task in (*OWN_TASKS.values(), *HELM_TASKS.values()):
        for _ in range(200):
            texts.append(task.layout.prompt([task.generate(rng, 1.0)], task.generate(rng, 1.0)))
    return texts + [memo(rng) for _ in range(300)]


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_positions: int) -> None:
    """Write ``tokenizer.json`` and a ``tokenizer_config.json`` that every version of transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
