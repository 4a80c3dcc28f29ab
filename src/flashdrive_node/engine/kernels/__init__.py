"""Kernels for few tokens on a long context: what a graphed step needs and PyTorch's own kernels do slowly or in parts.

Every function has a Triton form and a PyTorch reference of the same signature; `backend` picks one per call. All can
be captured in a CUDA graph: lengths and slots are read on the device, and shapes alone decide what is launched.
"""
