"""Tasks on features: kNN, probes, retrieval, clustering, verification, few-shot, geometry."""
