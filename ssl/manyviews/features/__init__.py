"""Pretrained backbones, encoding, the feature store, and a scikit-learn transformer."""
