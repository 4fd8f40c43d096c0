"""Training: the loop, the gradient, the objective, what happens around an update."""
