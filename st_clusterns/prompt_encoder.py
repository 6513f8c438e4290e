"""Prompt-based sentence encoding (PromptBERT; Jiang et al., EMNLP 2022): a sentence is read within a template.

1. *Read.* The tokens of the template before the sentence, the sentence, the tokens after it. Each part is tokenized by
   itself, and only the sentence is cut at the maximum length, so the template is always whole.
2. *Represent.* The embedding is the last hidden state of the template's mask token.
3. *Remove the template's bias.* The empty template is read with the position ids that its tokens have around the
   sentence. The hidden state of its mask token is subtracted. It depends on the sentence's number of tokens only, so it
   is computed once for each length of a batch.

Position ids are counted from a row's first token, so an embedding depends neither on padding nor on its batch.

Shapes: `B` rows, `T` tokens of a padded row, `L` distinct lengths, `P` tokens of the template, `D` dimension.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer, WordWeights
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

PLACE, MASK = "{sentence}", "[MASK]"
BiasRemoval = Literal["training", "always", "never"]


@dataclass(frozen=True)
class Template:
    """A template as tokens."""

    before: list[int]  # token ids before the sentence, with the first special token
    after: list[int]  # and after it
    space: str  # whitespace before the sentence's place: where spaces are tokens, it belongs to the sentence
    mask_first: bool  # whether the mask token stands before the sentence

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


def read_template(text: str, tokenizer: Any) -> Template:
    """Tokenize a template.

    Args:
        text: the template, with `{sentence}` once and the mask token once: `[MASK]`, or the tokenizer's own.
        tokenizer: that of the model.

    Raises:
        ValueError: if the tokenizer has no mask token, or the template not exactly one place and one mask token.
    """
    mask = tokenizer.mask_token
    if mask is None:
        raise ValueError("The model's tokenizer has no mask token, which a prompt needs: choose a BERT-like model.")
    if text.count(PLACE) != 1:
        raise ValueError(f"template={text!r} must hold {PLACE} exactly once: it is the sentence's place.")
    before, after = text.replace(MASK, mask).split(PLACE)
    space = before[len(before.rstrip()) :]
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before.rstrip(), after))
    if (before + after).count(tokenizer.mask_token_id) != 1:
        raise ValueError(f"template={text!r} must hold the mask token, {MASK} or {mask}, exactly once.")
    special = tokenizer(mask)["input_ids"]
    middle = special.index(tokenizer.mask_token_id)
    mask_first = tokenizer.mask_token_id in before
    return Template(special[:middle] + before, after + special[middle + 1 :], space, mask_first)


class PromptTransformer(Transformer):  # type: ignore[misc]  # the host library is not typed
    """A transformer that embeds a sentence by the mask token of a template around it; needs no pooling.

        prompt = PromptTransformer("bert-base-uncased", 'This sentence : "{sentence}" means [MASK].')
        model = SentenceTransformer(modules=[prompt])

    A prompt (`encode(prompt=...)`, `prompts` of the training arguments, by column) is another template in its place: so
    two views of a sentence get two templates. `max_seq_length` counts all tokens, those of the template included.
    Loading a saved model needs this package and `trust_remote_code=True`, as any module that is not part of
    sentence-transformers; `to_standard_modules` makes a model that needs neither.

    Args:
        model_name_or_path: a name on the hub, or a path: an encoder with a mask token and absolute positions.
        template: the text around the sentence, see `read_template`.
        remove_bias: when the template's bias is subtracted: in "training" only, as PromptBERT and the authors of
            ClusterNS do without labels, "always" or "never".
        settings: as `Transformer`.

    Raises:
        ValueError: if the model is a decoder, takes no position ids, or has no room for the template and a token; see
            also `read_template`.
    """

    config_keys = [*Transformer.config_keys, "template", "remove_bias"]  # noqa: RUF012  # as in the host library

    def __init__(
        self, model_name_or_path: str, template: str, remove_bias: BiasRemoval = "training", **settings: Any
    ) -> None:
        super().__init__(model_name_or_path, **{**settings, "unpad_inputs": False})
        if remove_bias not in get_args(BiasRemoval):
            raise ValueError(f"remove_bias={remove_bias!r} must be one of {', '.join(get_args(BiasRemoval))}.")
        kind = type(self.model).__name__
        if any(getattr(module, "is_causal", False) for module in self.model.modules()):
            raise ValueError(f"{kind} is a decoder: its mask token does not see what follows it. Choose an encoder.")
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            raise ValueError(f"{kind} takes no position ids, which the bias needs. Choose a BERT-like model.")
        tables = (getattr(module, "position_embeddings", None) for module in self.model.modules())
        table = next((table for table in tables if isinstance(table, nn.Embedding)), None)
        padding = None if table is None else table.padding_idx
        self.first_position = 0 if padding is None else padding + 1  # RoBERTa's positions begin behind its padding
        self.n_positions = self.config.max_position_embeddings - self.first_position
        self.max_seq_length = min(self.tokenizer.model_max_length, self.n_positions)
        self.template = template
        self.remove_bias = remove_bias
        self._templates: dict[str, Template] = {}
        self.room(self.read(template))

    def read(self, template: str) -> Template:
        """Return a template as tokens, made once."""
        if template not in self._templates:
            self._templates[template] = read_template(template, self.tokenizer)
        return self._templates[template]

    def room(self, template: Template) -> int:
        """Return how many tokens of a sentence are read within a template; ValueError if none."""
        room = min(self.max_seq_length or self.n_positions, self.n_positions) - len(template)
        if room < 1:
            raise ValueError(
                f"The template has {len(template)} tokens, which leaves no room for a sentence: the model has "
                f"{self.n_positions} positions, and max_seq_length={self.max_seq_length}. Shorten the template, or "
                "raise max_seq_length."
            )
        return int(room)

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Tokenize sentences within the template, or within that of `prompt`."""
        if not inputs:
            return {}
        text = prompt or self.template
        template = self.read(text)
        sentences = self.tokenizer(
            [template.space + sentence if sentence else "" for sentence in inputs],
            add_special_tokens=False,
            truncation=True,
            max_length=self.room(template),
        )["input_ids"]
        rows = [template.before + sentence + template.after for sentence in sentences]
        features = pad_without_fast_tokenizer_warning(self.tokenizer, {"input_ids": rows}, return_tensors="pt")
        return {**features, "modality": "text", "template": text}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embed the sentences: the hidden state of the mask token, less the template's bias."""
        template = self.read(features.get("template", self.template))
        tokens, mask = features["input_ids"], features["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0) + self.first_position  # (B, T)
        is_mask = (tokens == self.tokenizer.mask_token_id).int()  # a sentence may hold the mask token as well
        place = is_mask.argmax(dim=1) if template.mask_first else tokens.shape[1] - 1 - is_mask.flip(1).argmax(dim=1)
        hidden = self._hidden({"input_ids": tokens, "attention_mask": mask, "position_ids": positions}, **kwargs)
        rows = torch.arange(len(tokens), device=tokens.device)
        embedding = hidden[rows, place]  # (B, D)
        if self.remove_bias == "always" or (self.remove_bias == "training" and self.training):
            embedding = embedding - self._bias(template, mask.sum(dim=1) - len(template), **kwargs)
        return {**features, "token_embeddings": hidden, "sentence_embedding": embedding}

    def _bias(self, template: Template, lengths: Tensor, **kwargs: Any) -> Tensor:
        """Return the mask token's state in the empty template, for each row's number of tokens: (B,) -> (B, D)."""
        lengths, inverse = torch.unique(lengths, return_inverse=True)  # (L,), (B,)
        tokens = torch.tensor(template.before + template.after, device=lengths.device)
        positions = torch.arange(len(template), device=lengths.device) + self.first_position
        shift = (torch.arange(len(template), device=lengths.device) >= len(template.before)).long()
        features = {
            "input_ids": tokens.expand(len(lengths), -1),
            "attention_mask": torch.ones_like(tokens).expand(len(lengths), -1),
            "position_ids": positions + lengths[:, None] * shift,  # (L, P)
        }
        place = int((tokens == self.tokenizer.mask_token_id).nonzero())
        return self._hidden(features, **kwargs)[:, place][inverse]

    def _hidden(self, features: dict[str, Tensor], **kwargs: Any) -> Tensor:
        hidden: Tensor = super().forward(features, **kwargs)["token_embeddings"]
        return hidden


def to_standard_modules(model: SentenceTransformer) -> SentenceTransformer:
    """Return a prompt model in modules of sentence-transformers, which loads without this package.

    It is a copy, and embeds alike, but for sentences that hold the mask token themselves. The template becomes the
    tokenizer's special tokens, and `WordWeights` picks the mask token (1, all others 0) before mean pooling. These
    modules cannot subtract a vector that depends on a sentence's length, so bias removal is possible in training only.
    Templates passed as prompts are left out.

    Raises:
        ValueError: if the model is no prompt model, removes the bias in inference, or its tokenizer is not a fast one.
    """
    prompt = model[0]
    if not isinstance(prompt, PromptTransformer) or len(model) > 1:
        raise ValueError("The model is not a SentenceTransformer of a PromptTransformer alone.")
    if prompt.remove_bias == "always":
        raise ValueError(
            "remove_bias='always' cannot be expressed in modules of sentence-transformers: set "
            "model[0].remove_bias = 'training' to export the model without bias removal, or save it as it is."
        )
    if not prompt.tokenizer.is_fast:
        raise ValueError(f"{type(prompt.tokenizer).__name__} is no fast tokenizer, which alone keeps a template.")
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        prompt.model.save_pretrained(folder)
        _with_template(prompt.tokenizer, prompt.read(prompt.template)).save_pretrained(folder)
        transformer = Transformer(folder)
    transformer.max_seq_length = prompt.max_seq_length
    words = [str(word) for word in transformer.tokenizer.convert_ids_to_tokens(range(prompt.config.vocab_size))]
    picked = WordWeights(words, {prompt.tokenizer.mask_token: 1.0}, unknown_word_weight=0.0).requires_grad_(False)
    pooling = Pooling(model.get_embedding_dimension(), "mean")
    return SentenceTransformer(
        modules=[transformer, picked, pooling], device=model.device, similarity_fn_name=model.similarity_fn_name
    )


def _with_template(tokenizer: Any, template: Template) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts each sentence into a template, and pads on the right."""
    words = copy.deepcopy(tokenizer.backend_tokenizer)
    if template.space:
        spaced = [normalizers.Prepend(template.space), *([words.normalizer] if words.normalizer else [])]
        words.normalizer = normalizers.Sequence(spaced)
    parts = {"[BEFORE]": template.before, "[AFTER]": template.after}
    special = [{"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for name, ids in parts.items()]
    words.post_processor = TemplateProcessing("[BEFORE] $A [AFTER]", special_tokens=special)
    # A class of its own, as BertTokenizer, would put its own special tokens back when it is loaded.
    names = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)
