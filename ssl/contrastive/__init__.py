"""Self-supervised contrastive pretraining: from a folder of images to a backbone whose features are worth using."""
