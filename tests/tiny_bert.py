"""A random two-layer Bert with real dropout and a tokenizer of whole words, made in a second without any download."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

TOPICS = 8
WORDS = [f"w{i}" for i in range(200)]
DIMENSION = 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = SPECIAL + WORDS


def make_sentences(count: int, seed: int = 0, lengths: tuple[int, int] = (3, 9)) -> list[str]:
    """Sentences of some number of words, each from one topic's vocabulary."""
    draw = random.Random(seed)
    per_topic = len(WORDS) // TOPICS
    sentences = []
    for _ in range(count):
        topic = draw.randrange(TOPICS)
        words = WORDS[topic * per_topic : (topic + 1) * per_topic]
        sentences.append(" ".join(draw.choice(words) for _ in range(draw.randint(*lengths))))
    return sentences


def make_tokenizer(step: int = 1, **settings: object) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, the ids `step` apart."""
    ids = {
        word: i if i < len(SPECIAL) else len(SPECIAL) + step * (i - len(SPECIAL)) for i, word in enumerate(VOCABULARY)
    }
    tokenizer = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokens = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**tokens, "model_max_length": 16, **settings})


def save_bert(folder: Path, dropout: float = 0.1, seed: int = 0) -> Path:
    """Write a random Bert as a Hugging Face checkpoint."""
    make_tokenizer().save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=DIMENSION,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def load_model(folder: Path, **transformer: object) -> SentenceTransformer:
    """Load a `save_bert` checkpoint as a sentence-transformers model on the CPU."""
    bert = Transformer(str(folder), **transformer)
    return SentenceTransformer(modules=[bert, Pooling(DIMENSION)], device="cpu")
