"""Token files, tokenizers and the loader; one folder with a prepare.py for each data set."""
