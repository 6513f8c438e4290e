"""Tiny random BERT and RoBERTa with tokenizers of their families, and a slow prompt encoder to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_bert import DIMENSION, SPECIAL, WORDS
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

TEMPLATES = {  # those of PromptBERT for both views
    "bert": ('This sentence of "{sentence}" means [MASK].', 'This sentence : "{sentence}" means [MASK].'),
    "roberta": ("This sentence : ' {sentence} ' means[MASK].", "The sentence : ' {sentence} ' means[MASK]."),
}
SENTENCES = ["w1", "w2 w3, w4!", "W5 w199 w7 w8 w9", " ".join(WORDS[20:45]), "w9 unknowable \u00e9t\u00e9 w3"]
SIZES: dict[str, Any] = {
    "hidden_size": DIMENSION,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,  # so that hidden states differ from token to token
}


def bert_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """WordPiece behind BERT's normaliser, lower case."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*SPECIAL, *WORDS, "this", "sentence", "of", "means", *letters, *(f"##{letter}" for letter in letters)]
    words = list(dict.fromkeys(words))
    tokenizer = Tokenizer(WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, "model_max_length": 32, **settings})


def roberta_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE, in which a space is part of the next token, and a mask token that takes the space before it."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    texts = [*(f" {word} {word}" for word in WORDS), *(t for pair in TEMPLATES.values() for t in pair)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    names = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
    tokens = {f"{name}_token": token for name, token in names.items()}
    mask = AddedToken("<mask>", lstrip=True, special=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token=mask, **{**tokens, "model_max_length": 32, **settings}
    )


TOKENIZERS = {"bert": bert_tokenizer, "roberta": roberta_tokenizer}


def save_backbone(family: str, folder: Path, positions: int = 40, **settings: Any) -> Path:
    """Write a random checkpoint of a family; `settings` are the tokenizer's."""
    tokenizer = TOKENIZERS[family](**settings)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    if family == "bert":
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **SIZES)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    else:
        ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **ids, **SIZES)
        RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@torch.no_grad()
def slow_prompt_embedding(folder: Path, template: str, sentence: str, longest: int, bias: bool) -> Tensor:
    """One sentence at a time, without padding, from PromptBERT's description (sections 4.1 and 4.2), (D,).

    `[CLS] prefix sentence suffix [SEP]`, the hidden state of [MASK]; minus that of the template without the sentence,
    in which every token keeps the position it had. `longest` bounds all tokens.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    network = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    first = 2 if network.config.model_type == "roberta" else 0  # RoBERTa numbers positions from its padding id + 1
    prefix, suffix = template.replace("[MASK]", tokenizer.mask_token).split("{sentence}")
    if prefix.endswith(" "):
        prefix, sentence = prefix[:-1], f" {sentence}"
    pieces = []
    for part in (prefix, sentence, suffix):
        pieces.append([tokenizer.convert_tokens_to_ids(token) for token in tokenizer.tokenize(part)])
    left, middle, right = [tokenizer.cls_token_id, *pieces[0]], pieces[1], [*pieces[2], tokenizer.sep_token_id]
    while len(left) + len(middle) + len(right) > longest:
        middle.pop()
    whole, positions = [*left, *middle, *right], []
    for place in range(len(whole)):
        positions.append(first + place)
    mask_place = len(left) + len(middle) + right.index(tokenizer.mask_token_id)
    hidden = network(torch.tensor([whole]), position_ids=torch.tensor([positions])).last_hidden_state[0]
    embedding = hidden[mask_place]
    if bias:
        kept = [place for place in range(len(whole)) if place < len(left) or place >= len(left) + len(middle)]
        tokens, places = [whole[place] for place in kept], [positions[place] for place in kept]
        empty = network(torch.tensor([tokens]), position_ids=torch.tensor([places])).last_hidden_state[0]
        embedding = embedding - empty[kept.index(mask_place)]
    return embedding
