"""Afterwards: STS, mteb tasks, clustering of short texts."""
