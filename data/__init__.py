"""Texts to ids: reading, downloading and building corpora.

A corpus is a folder with train.txt, valid.txt and test.txt. Nothing here imports another part
of the project.
"""
