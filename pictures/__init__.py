"""Drawing: layout, style and files of every picture."""
