"""Ablation tables: from a file of rows to runs, and from their folders to a table."""
