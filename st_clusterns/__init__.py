"""Train sentence embeddings from plain sentences, with negatives that know the topics."""

from st_clusterns.clusters import Clusters
from st_clusterns.corpus import CorpusClusters, cluster_corpus
from st_clusterns.loss import ClusterNSLoss

__version__ = "0.1.0"

__all__ = ["ClusterNSLoss", "Clusters", "CorpusClusters", "cluster_corpus"]
