"""Kernels ahead of time, without a GPU: machine code, and bytes moved in the interpreter."""
