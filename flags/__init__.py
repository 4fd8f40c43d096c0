"""The programs' flags, each declared once. Nothing here imports torch."""
