"""Features of images: a pretrained backbone read back, encoding, the feature store, a scikit-learn transformer."""
