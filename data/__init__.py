"""Token files, tokenizers, the loader; a folder for each data set."""
