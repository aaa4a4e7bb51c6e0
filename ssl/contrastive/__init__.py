"""Self-supervised contrastive pretraining: from a folder of images to a backbone whose features are worth using."""

# Imported for what it does: after it `timm.create_model` knows the small-image backbones.
from contrastive import small_models as small_models
