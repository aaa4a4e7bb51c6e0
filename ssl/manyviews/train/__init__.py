"""Training: pretraining, its steps and its setup, and fine-tuning."""
