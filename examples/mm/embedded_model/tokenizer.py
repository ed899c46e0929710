"""A CLIP tokenizer whose byte-pair merges are learnt from the captions: nearly every caption word is one token."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTokenizer

MAX_TOKENS = 24  # positions of the text tower, start and end marks included
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: list[str], folder: Path, vocab_size: int = 8192) -> CLIPTokenizer:
    """Learn merges from ``texts`` and save the tokenizer (``vocab.json``, ``merges.txt``, configuration) in ``folder``.

    All 256 bytes are in the alphabet, so any Unicode text tokenises.
    """
    template = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[])
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = template.backend_tokenizer.normalizer
    learner.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        for word, _ in learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(text)):
            words[word] += 1
    alphabet = _byte_alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        # With fixed numbers from the start: the library would number them in the order of a randomised hash table, and
        # ties between equally frequent pairs are broken by number.
        special_tokens=[*alphabet, *(letter + "</w>" for letter in alphabet)],
        show_progress=False,
    )
    # Sorted, and each distinct word once: the result does not depend on the order or number of captions.
    learner.pre_tokenizer = None
    learner.normalizer = None
    learner.train_from_iterator(sorted(words), trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learnt["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges), encoding="utf-8"
    )
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, sorted."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())
