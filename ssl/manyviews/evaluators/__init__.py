"""Tasks on features: kNN, probes, retrieval, clustering, verification, geometry."""
