"""How gradients flow back through time: measured, put into words, drawn."""
