"""`ClusterNSLoss` against loops written from the definition, and against misuse."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import MODES, D, K, TokenStub, corpus, cos, default, features, gradients, padded, published, views
from conftest import StubModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny_bert import DIMENSION, make_sentences
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from st_clusterns import CachedClusterNSLoss, ClusterDataLoader, ClusterNSLoss, CorpusClusters, embed_corpus
from st_clusterns.losses.terms import NO_CLUSTER
from st_clusterns.losses.text_hashes import text_hashes

# The definition, row by row


def slow_step(
    columns: list[Tensor],
    texts: list[list[int]] | None,
    centroids: Tensor,
    trusted: list[bool],
    temperature: float,
    pull_weight: float,
    known: dict[int, int],
) -> Tensor:
    """Return the loss of a batch, one row and one candidate at a time; `known` is the cluster of known texts."""
    anchors, positives, *negatives = columns
    rows = range(len(anchors))

    def shares(cosines: list[Tensor]) -> list[Tensor]:
        weights = [math.e ** (cosine / temperature) for cosine in cosines]
        return [weight / sum(weights) for weight in weights]

    def cluster_of(row: int) -> int | None:
        cluster = max(range(len(centroids)), key=lambda k: cos(anchors[row], centroids[k]).item())
        if texts is not None:
            cluster = known.get(texts[0][row], known.get(texts[1][row], cluster))
        return cluster if trusted[cluster] else None

    def repeats(column: int, j: int, i: int) -> bool:
        """Whether a text is that of row i's anchor or of its positive."""
        return texts is not None and texts[column][j] in (texts[0][i], texts[1][i])

    ids = [cluster_of(row) for row in rows]
    total = torch.zeros((), dtype=torch.float64)
    for i in rows:
        candidates = [cos(anchors[i], positives[i])]
        for j in rows:
            same_cluster = ids[j] == ids[i] and ids[i] is not None
            same_text = repeats(1, j, i) or (texts is not None and texts[0][j] == texts[0][i])
            if j != i and not same_cluster and not same_text:
                candidates.append(cos(anchors[i], positives[j]))
        for number, column in enumerate(negatives, start=2):
            candidates += [cos(anchors[i], column[j]) for j in rows if not repeats(number, j, i)]
        total = total - shares(candidates)[0].log() / len(rows)
        if ids[i] is not None:
            target = shares([cos(centroids[ids[i]], centroid) for centroid in centroids])
            found = shares([cos(anchors[i], centroid) for centroid in centroids])
            pull = -sum(share * guess.log() for share, guess in zip(target, found, strict=True))
            total = total + pull_weight * pull / len(rows)
    return total


TRUST = {"trusted": (1.0, 0.9, 0.8, 0.7), "some trusted": (0.9, 0.1, 0.0, 1.0), "none trusted": (0.1,) * K}
TEXTS = ["unknown", "distinct", "repeated"]


def draw_texts(kind: str, n_columns: int, n_rows: int) -> list[list[int]] | None:
    if kind == "unknown":
        return None
    if kind == "distinct":
        return torch.randperm(n_columns * n_rows).reshape(n_columns, n_rows).tolist()
    return torch.randint(0, 6, (n_columns, n_rows)).tolist()


def hashes_of(texts: list[list[int]] | None) -> list[Tensor] | None:
    return texts and [text_hashes(padded([[number] for number in column])) for column in texts]


@pytest.mark.parametrize("n_negatives", [0, 1, 2])
@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("trust", TRUST.values(), ids=TRUST)
@pytest.mark.parametrize("stub", [StubModel, TokenStub], ids=["no tokenizer", "tokenizer"])
def test_the_loss_is_its_definition_row_by_row(
    stub: type[StubModel], trust: tuple[float, ...], kind: str, n_negatives: int
) -> None:
    """Values and gradients in float64, with and without the pull."""
    clusters = corpus(trust=trust)
    known = dict(enumerate(clusters.ids.tolist())) if stub is TokenStub else {}
    centroids = torch.as_tensor(clusters.centroids).double()
    for trial, (temperature, pull_weight) in enumerate([(0.1, 1.0), (0.05, 0.0), (0.7, 2.5)]):
        torch.manual_seed(trial)
        loss = ClusterNSLoss(stub(D), clusters, temperature, pull_weight).double()
        columns = views(7, 2 + n_negatives, dtype=torch.float64)
        texts = draw_texts(kind, len(columns), 7)
        value = loss.compute_loss_from_embeddings(columns, hashes_of(texts))
        trusted = [share >= 0.2 for share in trust]
        expected = slow_step(columns, texts, centroids, trusted, temperature, pull_weight, known)
        # The buffer holds normalised float32 centroids.
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients(value, columns), gradients(expected, columns), rtol=1e-5, atol=1e-6)


def test_a_corpus_without_topics_has_no_cluster_terms_but_masks_repeated_texts() -> None:
    columns, texts = views(7, 3, dtype=torch.float64), draw_texts("repeated", 3, 7)
    loss = ClusterNSLoss(StubModel(D), corpus(has_topics=False), temperature=0.5).double()
    value = loss.compute_loss_from_embeddings(columns, hashes_of(texts))
    centroids = torch.as_tensor(corpus().centroids).double()
    torch.testing.assert_close(value, slow_step(columns, texts, centroids, [False] * K, 0.5, 1.0, {}))
    assert value < slow_step(columns, None, centroids, [False] * K, 0.5, 1.0, {}) - 1e-3


@pytest.mark.parametrize(("has_topics", "temperature"), [(True, 0.1), (False, 0.05)])
def test_the_default_temperature_is_that_of_the_verdict(has_topics: bool, temperature: float) -> None:
    assert ClusterNSLoss(StubModel(D), corpus(has_topics)).temperature == temperature
    assert ClusterNSLoss(StubModel(D), corpus(has_topics), temperature=0.3).temperature == 0.3


def test_without_topics_it_is_the_built_in_loss_with_its_defaults() -> None:
    model, columns = StubModel(D), views()
    expected = MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(columns, None)
    for has_topics in (False, True):
        value = ClusterNSLoss(model, corpus(has_topics)).compute_loss_from_embeddings(columns)
        assert bool(torch.isclose(value, expected)) != has_topics


# Repeated texts


def mnrl(columns: list[Tensor], masked: list[tuple[int, int]]) -> Tensor:
    """The built-in loss at its own temperature, without some (row, candidate) pairs."""
    anchors, *candidates = columns
    logits = 20 * F.cosine_similarity(anchors[:, None], torch.cat(candidates)[None], dim=2)
    for row, candidate in masked:
        logits[row, candidate] = -torch.inf
    return F.cross_entropy(logits, torch.arange(len(anchors)))


def value_of(columns: list[Tensor], texts: list[list[list[int]]], side: str = "right") -> Tensor:
    """The loss in a corpus without topics: repeated texts are all that it can mask."""
    loss = ClusterNSLoss(StubModel(D), corpus(has_topics=False))
    return loss([features(c, **padded(text, side)) for c, text in zip(columns, texts, strict=True)])


A, B, C, X, Y, Z = [5], [6, 7], [7, 6], [8, 9, 10], [8, 9], [9, 9, 9, 9]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("texts", "masked"),
    [
        ([[A, B, C], [X, Y, Z]], []),
        ([[A, B, A], [X, Y, Z]], [(0, 2), (2, 0)]),
        ([[A, B, C], [X, Y, X]], [(0, 2), (2, 0)]),
        ([[A, B, C], [X, A, Z]], [(0, 1)]),
        ([[A, B, C], [A, B, C]], []),
        ([[A, B, C], [X, Y, Z], [X, A, B]], [(0, 3), (0, 4), (1, 5)]),
        ([[A, B, C], [X, Y, Z], [[1], [2], [3]], [[4], Z, C]], [(2, 7), (2, 8)]),
    ],
    ids=["distinct", "anchors", "positives", "positive is an anchor", "own", "negatives", "second negative column"],
)
def test_repeated_texts_are_no_negatives(
    texts: list[list[list[int]]], masked: list[tuple[int, int]], side: str
) -> None:
    columns = views(3, len(texts))
    value, expected = value_of(columns, texts, side), mnrl(columns, masked)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value, columns), gradients(expected, columns))


def test_one_column_masks_copies_of_a_sentence() -> None:
    rows = torch.randn(3, D)
    loss = ClusterNSLoss(StubModel(D), corpus(has_topics=False))
    value = loss([features(rows, **padded([A, B, A]))])
    torch.testing.assert_close(value, mnrl([rows, rows], [(0, 2), (2, 0)]))


def test_copies_are_masked_across_trusted_clusters_as_well() -> None:
    """Dropout can put two copies of a text into two clusters."""
    centroids = torch.as_tensor(corpus().centroids)
    columns = [centroids.clone(), centroids + 0.1]  # one row a cluster: the clusters mask nothing
    loss = default(pull_weight=0.0, temperature=0.05)
    plain = loss([features(column) for column in columns])
    torch.testing.assert_close(plain, mnrl(columns, []))
    repeated = [features(column, **padded([A, B, A, C])) for column in columns]
    torch.testing.assert_close(loss(repeated), mnrl(columns, [(0, 2), (2, 0)]))


def test_texts_of_one_column_only_are_not_compared() -> None:
    columns = views(3)
    loss = ClusterNSLoss(StubModel(D), corpus(has_topics=False))
    value = loss([features(columns[0], **padded([A, A, A])), features(columns[1])])
    torch.testing.assert_close(value, mnrl(columns, []))


def test_a_batch_of_one_text_has_no_negatives() -> None:
    columns = views(3)
    value = value_of(columns, [[A, A, A], [B, B, B]])
    assert value == 0
    assert all(gradient.isfinite().all() for gradient in gradients(value, columns))


def test_copies_are_masked_in_an_unpadded_batch() -> None:
    columns = views(3)
    flat = {"input_ids": torch.tensor([[5, 6, 7, 5]]), "cu_seq_lens_q": torch.tensor([0, 1, 3, 4], dtype=torch.int32)}
    loss = ClusterNSLoss(StubModel(D), corpus(has_topics=False))
    value = loss([features(column, **flat) for column in columns])
    torch.testing.assert_close(value, mnrl(columns, [(0, 2), (2, 0)]))


def static_model() -> SentenceTransformer:
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(20)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    static = StaticEmbedding(tokenizer, embedding_dim=D)
    return SentenceTransformer(modules=[static], device="cpu")


def test_copies_are_masked_with_static_embeddings() -> None:
    model = static_model()
    loss = ClusterNSLoss(model, corpus(has_topics=False))
    anchors, positives = ["w1 w2", "w3", "w1 w2", "w2 w1"], ["w4", "w5", "w6", "w7 w8"]
    columns = [model.preprocess(texts) for texts in (anchors, positives)]
    assert "offsets" in columns[0]
    embeddings = [model(dict(column))["sentence_embedding"] for column in columns]
    torch.testing.assert_close(loss(columns), mnrl(embeddings, [(0, 2), (2, 0)]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_copies_are_masked_with_a_real_tokenizer(side: str, model: SentenceTransformer) -> None:
    model.eval()
    model.tokenizer.padding_side = side
    loss = ClusterNSLoss(model, corpus(has_topics=False, dimension=DIMENSION))
    anchors, positives = ["w1 w2", "w3 w4 w5", "w1 w2", "w2 w1"], ["w9", "w1 w2", "w5 w6 w7 w8", "w3"]
    columns = [model.preprocess(texts) for texts in (anchors, positives)]
    embeddings = [model(dict(column))["sentence_embedding"] for column in columns]
    expected = mnrl(embeddings, [(0, 2), (2, 0), (0, 1), (2, 1)])
    torch.testing.assert_close(loss(columns), expected)


# The clusters


def test_without_clusters_three_ways_out_are_named() -> None:
    with pytest.raises(ValueError, match="has no clusters") as error:
        ClusterNSLoss(StubModel(D))
    for way_out in ("ClusterDataLoader", "clusters=CorpusClusters.fit(sentences, model)", 'from_preset(model, "paper'):
        assert way_out in str(error.value)


def test_clusters_noted_on_the_model_are_found() -> None:
    model, noted, given = StubModel(D), corpus(), corpus(has_topics=False)
    model.corpus_clusters = noted
    assert ClusterNSLoss(model).clusters is noted
    assert ClusterNSLoss(model, given).clusters is given
    model.corpus_clusters = given
    assert ClusterNSLoss(model).clusters is given


@pytest.mark.parametrize("attribute", ["module", "_orig_mod"])
def test_clusters_noted_on_a_wrapped_model_are_found(attribute: str) -> None:
    inner = StubModel(D)
    wrapper = StubModel(D)
    setattr(wrapper, attribute, inner)
    corpus().note_on(inner)
    assert ClusterNSLoss(wrapper).clusters is inner.corpus_clusters


def test_a_loader_notes_its_clusters_for_the_loss(model: SentenceTransformer) -> None:
    for seed in (0, 1):
        loader = ClusterDataLoader(make_sentences(60), model, batch_size=8, seed=seed, show_progress_bar=False)
        assert ClusterNSLoss(model).clusters is loader.clusters


def test_names_in_the_place_of_models_and_clusters_are_told(model: SentenceTransformer) -> None:
    sentences, clusters = make_sentences(20), corpus()
    for call in (
        lambda: ClusterNSLoss("a-name", clusters),
        lambda: ClusterDataLoader(sentences, "a-name", batch_size=4),
        lambda: CorpusClusters.fit(sentences, "a-name"),
        lambda: embed_corpus(sentences, "a-name"),
        lambda: embed_corpus(sentences, None),
    ):
        with pytest.raises(ValueError, match=r"model must be a SentenceTransformer, got .*: load it by"):
            call()
    for wrong in (sentences, "paper/bert-base"):
        with pytest.raises(ValueError, match=r"clusters=.*ClusterNSLoss has no clusters\. Choose one"):
            ClusterNSLoss(model, wrong)
    with pytest.raises(ValueError, match="prompt_name='query' needs the model whose prompt it is"):
        CorpusClusters.fit(sentences, embeddings=np.eye(20), prompt_name="query")
    with pytest.raises(ValueError, match="The embeddings have 3 dimensions, the clusters"):
        clusters.predict(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"n_clusters must be a whole number, 2 or more, got 4\.5"):
        CorpusClusters.fit(sentences, embeddings=np.eye(20), n_clusters=4.5)
    for settings in ({"mini_batch_size": 1.5}, {"mini_batch_num_tokens": 99.5}):
        with pytest.raises(ValueError, match="must be a whole number, 1 or more"):
            CachedClusterNSLoss(model, clusters, **settings)
    assert embed_corpus([], model).shape == (0, model.get_embedding_dimension())


@pytest.mark.parametrize("dimension", [D - 1, D + 1, 2 * D])
def test_clusters_of_another_dimension_are_refused(dimension: int) -> None:
    with pytest.raises(ValueError, match=f"model has {D} dimensions, the clusters {dimension}: fit them with this"):
        ClusterNSLoss(StubModel(D), corpus(dimension=dimension))


def test_the_topic_layer_of_the_same_clusters_is_refused(model: SentenceTransformer) -> None:
    rows = np.random.default_rng(0).normal(size=(80, DIMENSION)) + 20 * np.eye(4, DIMENSION).repeat(20, axis=0)
    clusters = CorpusClusters.fit([f"text {number}" for number in range(80)], n_clusters=4, embeddings=rows)
    assert clusters.has_topics
    ClusterNSLoss(model, clusters)
    clusters.add_topic_layer(model)
    with pytest.raises(ValueError, match=r"has the topic layer of these clusters.*remove_topic_layer"):
        ClusterNSLoss(model, clusters)
    ClusterNSLoss(model, corpus(dimension=DIMENSION))  # of other clusters, it is a part of the model as any other
    clusters.remove_topic_layer(model)
    ClusterNSLoss(model, clusters)


def test_no_step_changes_the_clusters_or_the_buffers() -> None:
    clusters = corpus()
    loss = ClusterNSLoss(StubModel(D), clusters)
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    arrays = {name: value.copy() for name, value in vars(clusters).items() if isinstance(value, np.ndarray)}
    fingerprint = clusters.fingerprint
    for mode in MODES.values():
        with mode(loss):
            loss.compute_loss_from_embeddings(views())
        assert all(torch.equal(before[name], buffer) for name, buffer in loss.named_buffers())
    loss.centroids.zero_()  # a buffer of its own, not a view of the array
    assert clusters.fingerprint == fingerprint
    assert all((getattr(clusters, name) == value).all() for name, value in arrays.items())


def test_the_clusters_are_not_in_the_state_dict() -> None:
    """They come from the corpus; a checkpoint of the loss fits clusters of any number."""
    assert default().state_dict() == {}
    assert {"centroids", "trusted"} <= {name for name, _ in default().named_buffers()}
    assert default().centroids.shape == (K, D)
    torch.testing.assert_close(default().centroids.norm(dim=1), torch.ones(K))


# The cluster of a row


def ids_of(loss: ClusterNSLoss, rows: Tensor, tokens: dict[str, Tensor]) -> list[int]:
    return loss.prepare([rows, rows], [text_hashes(tokens)] * 2).ids.tolist()


def test_a_clustered_sentence_keeps_its_cluster_and_others_have_the_nearest() -> None:
    """Wherever training has moved the embedding to."""
    loss = ClusterNSLoss(TokenStub(D), corpus())
    rows = loss.centroids[[3, 3, 0, 2, 1]]
    assert ids_of(loss, rows, padded([[5], [11], [99], [0], [5, 5]])) == [5 % K, 11 % K, 0, 0, 1]
    assert ids_of(default(), rows, padded([[5], [11], [99], [0], [5, 5]])) == [3, 3, 0, 2, 1]


def test_a_clustered_sentence_of_a_cluster_that_is_not_trusted_has_none() -> None:
    loss = ClusterNSLoss(TokenStub(D), corpus(trust=(1.0, 0.1, 1.0, 0.0)))
    rows = loss.centroids[[0, 2, 1, 0]]
    assert ids_of(loss, rows, padded([[5], [6], [6], [99]])) == [NO_CLUSTER, 2, 2, 0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_clustered_sentences_are_recognised_by_their_tokens(side: str, model: SentenceTransformer) -> None:
    """Whatever the order and the padding of a batch."""
    model.tokenizer.padding_side = side
    sentences = list(dict.fromkeys(make_sentences(60)))
    embeddings = 20 * np.eye(4, DIMENSION)[np.arange(len(sentences)) % 4]
    embeddings += np.random.default_rng(0).normal(size=embeddings.shape)
    clusters = CorpusClusters.fit(sentences, n_clusters=4, embeddings=embeddings)
    assert clusters.trusted.all()
    loss = ClusterNSLoss(model, clusters)
    places = torch.randperm(len(sentences))[:16]
    tokens = model.preprocess([sentences[place] for place in places])
    rows = -loss.centroids[clusters.ids[places]]  # far from their own centroid
    assert ids_of(loss, rows, tokens) == clusters.ids[places].tolist()
    others = model.preprocess([f"{sentences[place]} w0" for place in places])
    nearest = (rows @ loss.centroids.T).argmax(dim=1)
    assert ids_of(loss, rows, others) == nearest.tolist() != clusters.ids[places].tolist()


@pytest.mark.parametrize("width", [3, 6])
def test_truncated_embeddings_see_truncated_centroids(width: int) -> None:
    """As inside `MatryoshkaLoss`."""
    columns = [column.detach()[:, :width].double().requires_grad_() for column in views(7)]
    loss = default().double()
    value = loss.compute_loss_from_embeddings(columns)
    centroids = torch.as_tensor(corpus().centroids)[:, :width].double()
    torch.testing.assert_close(
        value, slow_step(columns, None, centroids, [True] * K, 0.1, 1.0, {}), rtol=1e-6, atol=1e-6
    )


def test_the_pull_sends_rows_to_their_own_centroid() -> None:
    rows = views(5)[0]
    loss = default(temperature=0.5)
    nearest = F.cosine_similarity(rows[:, None], loss.centroids[None], dim=2).argmax(dim=1)
    optimizer = torch.optim.SGD([rows], lr=1.0)

    def cosines() -> Tensor:
        return F.cosine_similarity(rows, loss.centroids[nearest], dim=1)

    before = cosines().detach()
    with_pull, without = loss, default(temperature=0.5, pull_weight=0.0)
    positives = rows.detach().clone()
    pull = with_pull.compute_loss_from_embeddings([rows, positives]) - without.compute_loss_from_embeddings(
        [rows, positives]
    )
    pull.backward()
    optimizer.step()
    assert (cosines() > before).all()


# Settings


@pytest.mark.parametrize(
    ("name", "value", "interval"),
    [
        *[("temperature", v, "above 0") for v in (0, -0.05, math.nan, math.inf)],
        *[("pull_weight", v, "0 or more") for v in (-0.1, math.nan, math.inf)],
    ],
)
def test_numbers_out_of_range_are_named(name: str, value: float, interval: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be {interval}, got {value}\."):
        default(**{name: value})


def test_arguments_of_the_published_loss_are_refused() -> None:
    with pytest.raises(TypeError, match="n_clusters"):
        ClusterNSLoss(StubModel(D), n_clusters=5)
    with pytest.raises(TypeError, match="clusters"):
        published(clusters=corpus())


def test_the_config_is_json_and_holds_every_setting() -> None:
    loss = ClusterNSLoss(StubModel(D), corpus(), 0.2, 0.5, True)
    config = loss.get_config_dict()
    assert json.loads(json.dumps(config)) == config
    settings = set(inspect.signature(ClusterNSLoss.__init__).parameters) - {"self", "model", "clusters"}
    assert set(config) == settings | {"n_clusters", "has_topics"}
    assert (config.pop("n_clusters"), config.pop("has_topics")) == (K, True)
    assert ClusterNSLoss(StubModel(D), corpus(), **config).get_config_dict() == loss.get_config_dict()
    assert config == {"temperature": 0.2, "pull_weight": 0.5, "gather_across_devices": True}


def test_what_the_host_library_reads() -> None:
    loss = default(temperature=0.07)
    assert loss.temperature == 0.07
    assert "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation" in loss.citation
    assert loss.citation.strip().startswith("@inproceedings{")
    assert "2023.findings-acl.555" in loss.citation


# Training


@pytest.mark.parametrize("train", [True, False], ids=["train()", "as the loader left it"])
def test_a_plain_training_loop_learns(train: bool, model: SentenceTransformer) -> None:
    """Embedding the corpus leaves a model in evaluation mode, and a loop may forget `model.train()`."""
    loader: Any = ClusterDataLoader(make_sentences(96), model, batch_size=32, n_clusters=4, show_progress_bar=False)
    loader.collate_fn = lambda examples: model.preprocess([example.texts[0] for example in examples])
    held: Any = model.preprocess(make_sentences(32, seed=1))
    loss = ClusterNSLoss(model)

    def measure() -> float:
        training = model.training
        model.eval()
        with torch.no_grad():
            value = loss([dict(held)]).item()
        model.train(training)
        return value

    before = measure()
    if train:
        model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(4):
        for batch in loader:
            optimizer.zero_grad()
            loss([batch]).backward()
            optimizer.step()
    assert measure() < 0.9 * before
