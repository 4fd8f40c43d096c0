"""Evaluation of trained models: test loss, bigram baseline, samples."""
