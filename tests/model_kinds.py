"""Tiny random models of every kind that people load, and the ways to use them; `docs/models.md` shows the table.

`python tests/model_kinds.py` writes the table anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    LSTM,
    BoW,
    Dense,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from tiny_bert import DIMENSION, VOCABULARY, WORDS, make_tokenizer, save_bert
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLNetConfig,
    XLNetModel,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

WAYS = {
    "fit": "`model.fit`",
    "trainer": "trainer",
    "cached": "cached loss",
    "command": "command",
    "evaluate": "`evaluate`",
}
PROMPT = "w190 w191 w192 "
SIZES: dict[str, Any] = {
    "hidden_size": DIMENSION,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "vocab_size": len(VOCABULARY),
}


@dataclass(frozen=True)
class Kind:
    """A kind of model, and which ways refuse it with which words."""

    build: Callable[[Path], Any]  # saves it into a folder; what it returns is not used
    refused: dict[str, str] = field(default_factory=dict)  # way: a part of the error's message
    load: dict[str, Any] = field(default_factory=dict)  # arguments of `SentenceTransformer(folder)`
    note: str = ""


def save(folder: Path, *modules: Any, **settings: Any) -> SentenceTransformer:
    model = SentenceTransformer(modules=list(modules), device="cpu", **settings)
    model.save(str(folder))
    return model


def backbone(
    network: Callable[[Any], Any], config: Any, pooling: str = "mean", **tokenizer: Any
) -> Callable[[Path], SentenceTransformer]:
    """A Hugging Face model behind sentence-transformers' modules."""

    def build(folder: Path) -> SentenceTransformer:
        torch.manual_seed(0)
        source = folder.with_name(f"{folder.name}_source")
        make_tokenizer(**tokenizer).save_pretrained(source)
        network(config).save_pretrained(source)
        return save(folder, Transformer(str(source)), Pooling(DIMENSION, pooling))

    return build


def bert(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> SentenceTransformer:
    source = save_bert(folder.with_name(f"{folder.name}_source"))
    model = SentenceTransformer(modules=[Transformer(str(source)), Pooling(DIMENSION)], device="cpu", **settings)
    model.to(dtype).save(str(folder))
    return model


def prompted(folder: Path) -> SentenceTransformer:
    source = save_bert(folder.with_name(f"{folder.name}_source"))
    settings: dict[str, Any] = {"prompts": {"topic": PROMPT}, "default_prompt_name": "topic"}
    return save(folder, Transformer(str(source)), Pooling(DIMENSION), **settings)


def prompt_left_out(folder: Path) -> SentenceTransformer:
    source = save_bert(folder.with_name(f"{folder.name}_source"))
    settings: dict[str, Any] = {"prompts": {"topic": PROMPT}, "default_prompt_name": "topic"}
    return save(folder, Transformer(str(source)), Pooling(DIMENSION, include_prompt=False), **settings)


def static(folder: Path) -> SentenceTransformer:
    torch.manual_seed(0)
    return save(folder, StaticEmbedding(make_tokenizer().backend_tokenizer, embedding_dim=DIMENSION))


def words(*rest: Callable[[], Any], trained: bool = True) -> Callable[[Path], SentenceTransformer]:
    def build(folder: Path) -> SentenceTransformer:
        torch.manual_seed(0)
        tokenizer = WhitespaceTokenizer(["PADDING", *WORDS], stop_words=[])
        first = WordEmbeddings(tokenizer, torch.randn(len(WORDS) + 1, 24), update_embeddings=trained)
        return save(folder, first, *(make() for make in rest))

    return build


def bow(folder: Path) -> SentenceTransformer:
    torch.manual_seed(0)
    return save(folder, BoW(vocab=WORDS), Dense(len(WORDS), DIMENSION))


def router(folder: Path) -> SentenceTransformer:
    routes = {}
    for seed, name in enumerate(("query", "document")):
        source = save_bert(folder.with_name(f"{folder.name}_{name}"), seed=seed)
        routes[name] = [Transformer(str(source)), Pooling(DIMENSION)]
    return save(folder, Router(routes, default_route="document"))


def router_of_two_kinds(folder: Path) -> SentenceTransformer:
    """As for queries on a phone: the default route is static, the other has a transformer."""
    torch.manual_seed(0)
    source = save_bert(folder.with_name(f"{folder.name}_document"))
    static = StaticEmbedding(make_tokenizer().backend_tokenizer, embedding_dim=DIMENSION)
    routes = {"query": [static], "document": [Transformer(str(source)), Pooling(DIMENSION)]}
    return save(folder, Router(routes, default_route="query"))


def router_without_default(folder: Path) -> None:
    router(folder)
    path = folder / "router_config.json"
    config = json.loads(path.read_text())
    config["parameters"] |= {"default_route": None, "allow_empty_key": False}
    path.write_text(json.dumps(config))


def import_peft() -> Any:
    """Import peft, or skip the test: a new transformers may ask for a peft that is not out yet (5.24 asks for 0.22)."""
    return pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)


def lora(folder: Path) -> SentenceTransformer:
    from peft import LoraConfig

    model = bert(folder.with_name(f"{folder.name}_base"))
    model = SentenceTransformer(str(folder.with_name(f"{folder.name}_base")), device="cpu")
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]))
    model.save(str(folder))
    return model


CODE = """
from transformers import BertConfig, BertModel
class MyConfig(BertConfig):
    model_type = "mine"
class MyModel(BertModel):
    config_class = MyConfig
"""


def custom_code(folder: Path) -> None:
    source = save_bert(folder)
    (source / "modeling_mine.py").write_text(CODE)
    path = source / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "mine", "architectures": ["MyModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_mine.MyConfig", "AutoModel": "modeling_mine.MyModel"}
    path.write_text(json.dumps(config))


def sparse(folder: Path) -> SparseEncoder:
    source = folder.with_name(f"{folder.name}_source")
    make_tokenizer().save_pretrained(source)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(source)
    model = SparseEncoder(modules=[MLMTransformer(str(source)), SpladePooling()], device="cpu")
    model.save(str(folder))
    return model


T5 = {"d_model": DIMENSION, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": len(VOCABULARY)}
XLNET = {"d_model": DIMENSION, "n_layer": 2, "n_head": 2, "d_inner": 64, "vocab_size": len(VOCABULARY)}
QWEN3 = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
HALF = dict.fromkeys(("fit", "trainer", "cached"), "small steps of the optimiser are lost: call model.float()")
FROZEN = dict.fromkeys(("fit", "trainer", "cached", "command"), "None of the model's .* weights is trainable")
TRUNCATED = dict.fromkeys(("fit", "trainer", "cached", "command"), r"truncate_dim=8 applies to encode")
OTHER_KIND = dict.fromkeys(WAYS, "The model is a SparseEncoder: pass a SentenceTransformer")
NO_ROWS = {"cached": "cannot cut the features"}
NO_ROUTE = dict.fromkeys(WAYS, "default route")

KINDS: dict[str, Kind] = {
    "BERT": Kind(bert),
    "XLM-RoBERTa": Kind(backbone(XLMRobertaModel, XLMRobertaConfig(**SIZES, **IDS))),
    "ModernBERT": Kind(backbone(ModernBertModel, ModernBertConfig(**SIZES, **IDS)), note="no dropout"),
    "Qwen3: last token, padded on the left": Kind(
        backbone(Qwen3Model, Qwen3Config(**QWEN3), "lasttoken", padding_side="left"), note="no dropout"
    ),
    "T5 encoder, no maximum length": Kind(backbone(T5EncoderModel, T5Config(**T5), model_max_length=None)),
    "XLNet, no maximum length": Kind(
        backbone(XLNetModel, XLNetConfig(**XLNET), padding_side="left", model_max_length=None)
    ),
    "token ids with holes": Kind(
        backbone(BertModel, BertConfig(**{**SIZES, "vocab_size": 3 * len(VOCABULARY)}), step=3)
    ),
    "float16 weights": Kind(lambda folder: bert(folder, torch.float16), HALF),
    "bfloat16 weights": Kind(lambda folder: bert(folder, torch.bfloat16), HALF),
    "T5 encoder in float16": Kind(
        backbone(lambda config: T5EncoderModel(config).half(), T5Config(**T5), model_max_length=None), HALF
    ),
    "dot product": Kind(lambda folder: bert(folder, similarity_fn_name="dot"), note="trained by cosine"),
    "`truncate_dim`": Kind(bert, TRUNCATED, {"truncate_dim": 8}),
    "default prompt": Kind(prompted),
    "prompt left out of pooling": Kind(prompt_left_out, {"fit": "treats the prompt .* as more than text"}),
    "StaticEmbedding": Kind(static, NO_ROWS, note="no dropout"),
    "word vectors": Kind(words(lambda: Pooling(24)), note="no dropout"),
    "frozen word vectors": Kind(words(lambda: Pooling(24), trained=False), FROZEN),
    "CNN": Kind(words(lambda: CNN(24, 16), lambda: Pooling(48)), note="no dropout"),
    "LSTM": Kind(words(lambda: LSTM(24, 16), lambda: Pooling(32)), note="no dropout"),
    "bag of words": Kind(bow, note="no dropout"),
    "Router": Kind(router, {"fit": "model.fit cannot tell a Router its route"}),
    "Router: StaticEmbedding and a transformer": Kind(
        router_of_two_kinds, {"fit": "model.fit cannot tell a Router its route", **NO_ROWS}
    ),
    "Router without a default route": Kind(router_without_default, NO_ROUTE),
    "LoRA adapter": Kind(lora, dict.fromkeys(("fit", "trainer", "cached"), FROZEN["fit"])),
    "custom code": Kind(custom_code, load={"trust_remote_code": True}),
    "sparse encoder": Kind(sparse, OTHER_KIND),
}

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
REASONS = {
    HALF["fit"]: "refused: call `model.float()` first",
    FROZEN["fit"]: "refused: no weight is trainable",
    TRUNCATED["fit"]: "refused: set `model.truncate_dim = None` first",
    OTHER_KIND["fit"]: "refused: no dense vector",
    NO_ROWS["cached"]: "refused: needs no cache",
    NO_ROUTE["fit"]: "refused: set one first",
    "model.fit cannot tell a Router its route": "refused: takes no `router_mapping`",
    "treats the prompt .* as more than text": "refused: takes no prompts",
}


def table() -> str:
    """The kinds of model and the ways to use them, as a table in Markdown."""
    lines = [f"| | {' | '.join(WAYS.values())} |", "|---" * (1 + len(WAYS)) + "|"]
    for name, kind in KINDS.items():
        cells = [REASONS[kind.refused[way]] if way in kind.refused else "yes" for way in WAYS]
        lines.append(f"| {name}{f' ({kind.note})' if kind.note else ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    start, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{start}{BEGIN}{table()}{END}{rest.split(END)[1]}", encoding="utf-8")
