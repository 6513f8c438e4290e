"""The papers that a model card cites, as BibTeX."""

CLUSTERNS = """
@inproceedings{deng2023clusteringaware,
    title = {Clustering-Aware Negative Sampling for Unsupervised Sentence Representation},
    author = {Deng, Jinghao and Wan, Fanqi and Yang, Tao and Quan, Xiaojun and Wang, Rui},
    booktitle = {Findings of the Association for Computational Linguistics: ACL 2023},
    year = {2023},
    url = {https://aclanthology.org/2023.findings-acl.555},
}
"""

PULL = """
@inproceedings{li2021prototypical,
    title = {Prototypical Contrastive Learning of Unsupervised Representations},
    author = {Li, Junnan and Zhou, Pan and Xiong, Caiming and Hoi, Steven C. H.},
    booktitle = {International Conference on Learning Representations},
    year = {2021},
    url = {https://arxiv.org/abs/2005.04966},
}

@inproceedings{bertinetto2020making,
    title = {Making Better Mistakes: Leveraging Class Hierarchies With Deep Networks},
    author = {Bertinetto, Luca and Mueller, Romain and Tertikas, Konstantinos and Samangooei, Sina and Lord, Nicholas},
    booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
    year = {2020},
    url = {https://arxiv.org/abs/1912.09393},
}
"""

IN_BATCH_NEGATIVES = """
@misc{oord2019representationlearningcontrastivepredictive,
    title = {Representation Learning with Contrastive Predictive Coding},
    author = {Aaron van den Oord and Yazhe Li and Oriol Vinyals},
    year = {2019},
    eprint = {1807.03748},
    archivePrefix = {arXiv},
    primaryClass = {cs.LG},
}
"""

GRADCACHE = """
@misc{gao2021scaling,
    title = {Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author = {Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year = {2021},
    eprint = {2101.06983},
    archivePrefix = {arXiv},
    primaryClass = {cs.LG},
}
"""

PREDICTION_STRENGTH = """
@article{tibshirani2005cluster,
    title = {Cluster Validation by Prediction Strength},
    author = {Tibshirani, Robert and Walther, Guenther},
    journal = {Journal of Computational and Graphical Statistics},
    volume = {14},
    number = {3},
    pages = {511--528},
    year = {2005},
    doi = {10.1198/106186005X59243},
}
"""

DROPOUT_VIEWS = """
@inproceedings{gao2021simcse,
    title = {{SimCSE}: Simple Contrastive Learning of Sentence Embeddings},
    author = {Gao, Tianyu and Yao, Xingcheng and Chen, Danqi},
    booktitle = {Proceedings of the 2021 Conference on Empirical Methods in Natural Language Processing},
    year = {2021},
    url = {https://arxiv.org/abs/2104.08821},
}
"""

SPAN_VIEWS = """
@inproceedings{lee2019latent,
    title = {Latent Retrieval for Weakly Supervised Open Domain Question Answering},
    author = {Lee, Kenton and Chang, Ming-Wei and Toutanova, Kristina},
    booktitle = {Proceedings of the 57th Annual Meeting of the Association for Computational Linguistics},
    year = {2019},
    url = {https://arxiv.org/abs/1906.00300},
}
"""

MEAN_WEIGHTS = """
@inproceedings{wortsman2022robust,
    title = {Robust Fine-Tuning of Zero-Shot Models},
    author = {Wortsman, Mitchell and Ilharco, Gabriel and Kim, Jong Wook and Li, Mike and Kornblith, Simon and Roelofs,
        Rebecca and Lopes, Raphael Gontijo and Hajishirzi, Hannaneh and Farhadi, Ali and Namkoong, Hongseok and
        Schmidt, Ludwig},
    booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
    year = {2022},
    url = {https://arxiv.org/abs/2109.01903},
}
"""
