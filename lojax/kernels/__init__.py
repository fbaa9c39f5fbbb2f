"""Kernels for GPUs and TPUs: the products of a low-rank layer, each in one pass over what is large. See `layer`."""
