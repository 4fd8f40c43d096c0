"""Ways to measure a trained model."""
