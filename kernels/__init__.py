"""Fast paths: layers, decoder, step and CUDA graphs, each with the numbers of plain torch."""
