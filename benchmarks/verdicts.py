"""Do the verdict on a corpus and its number of clusters depend on the draw? Halves and tenths, five seeds, no training.

The texts of a corpus are embedded once. Each draw of its distinct texts is clustered as `CorpusClusters.fit` does it.
The table compares the verdict ("topics" or not) with the one that is right: whether training on topics helps there,
as the plans evidence.json and narrow.json measure it. Documents end alike with clusters and without (views.json), so
no verdict on them is wrong. Corpora that are in the results file are not drawn again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from sentence_transformers import SentenceTransformer

import corpora
from compare import command, read_plan, versions
from st_clusterns import CorpusClusters, embed_corpus
from st_clusterns.clustering.n_clusters import trust_bound
from st_clusterns.files import write_json, write_text
from st_clusterns.training.quickstart import packaged_model

SHARES = (0.5, 0.1)
SEEDS = range(5)
MADE_BY = (
    "Made by `python benchmarks/verdicts.py --data-dir DIR --output DIR`, five draws (seeds 0 to 4) of each share."
)
WITHOUT_TOPICS = ("AskUbuntu", "wiki50000")


def draw(corpus: str, data: Path | None, cache: Path) -> list[dict[str, Any]]:
    """Cluster each draw from a corpus; return what was found."""
    texts = list(dict.fromkeys(corpora.load(corpus, data).texts))
    model = SentenceTransformer(packaged_model())
    rows = embed_corpus(texts, model, show_progress_bar=False, cache=cache)
    found = []
    for share in SHARES:
        for seed in SEEDS:
            chosen = np.random.default_rng(seed).permutation(len(texts))[: round(share * len(texts))]
            clusters = CorpusClusters.fit([texts[row] for row in chosen], seed=seed, embeddings=rows[chosen])
            found.append(
                {
                    "share": share,
                    "seed": seed,
                    "sentences": len(chosen),
                    "n_clusters": clusters.n_clusters,
                    "highest_trust": clusters.highest_trust,
                }
            )
    return found


def has_topics(one: dict[str, Any]) -> bool:
    """Whether a draw has topics by the verdict."""
    return bool(one["highest_trust"] >= trust_bound(one["sentences"]))


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return, for each corpus and share, how many draws have topics, and their numbers of clusters; and two sums."""
    lines = [
        "| corpus | topics help | " + " | ".join(f"{share:.0%} of it" for share in SHARES) + " |",
        "|---" * 4 + "|",
    ]
    same = right = count = judged = 0
    for corpus, draws in results.items():
        helps = "alike" if corpus in corpora.SEARCH else "no" if corpus in WITHOUT_TOPICS else "yes"
        cells = []
        for share in SHARES:
            part = [one for one in draws if one["share"] == share]
            with_topics = sum(map(has_topics, part))
            numbers = ", ".join(str(number) for number in sorted({one["n_clusters"] for one in part}))
            cells.append(f"{with_topics} of {len(part)}; K {numbers}; n {part[0]['sentences']:,}")
        lines.append(f"| {corpus} | {helps} | " + " | ".join(cells) + " |")
        topics = sum(map(has_topics, draws))
        count += len(draws)
        same += max(topics, len(draws) - topics)
        if helps != "alike":
            judged += len(draws)
            right += topics if helps == "yes" else len(draws) - topics
    return "\n".join(
        [
            *lines,
            "",
            f"Same verdict: {same / count:.0%} of {count} draws; right: {right / max(judged, 1):.0%} of {judged}.",
            "",
        ]
    )


def main() -> None:
    here = Path(__file__).parent
    plans = [row for plan in ("evidence.json", "narrow.json") for row in read_plan(here / plan)[1]]
    names = dict.fromkeys(name for row in plans for name in row.corpora if not name.endswith("held out"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "st_clusterns_benchmarks")
    parser.add_argument("--corpora", nargs="*", choices=[*names], default=[*names], help="only these corpora")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "verdicts.json"
    results = json.loads(file.read_text(encoding="utf-8"))["draws"] if file.exists() else {}
    for name in track([name for name in args.corpora if name not in results], "Corpora"):
        results[name] = draw(name, args.data_dir, args.cache / "embeddings")
        write_json({"draws": results, "versions": versions(), "command": command()}, file)
    write_text(f"# Verdicts\n\n{MADE_BY}\n\n{table(results)}", args.output / "README.md")
    print(table(results))


if __name__ == "__main__":
    main()
