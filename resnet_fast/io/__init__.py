"""Read and write files: whole or not at all, images, weights with what they say of themselves, figures."""
