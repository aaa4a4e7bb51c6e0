"""Evaluation tasks on extracted features: kNN, probes, retrieval, clustering, verification, geometry."""
