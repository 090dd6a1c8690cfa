"""The kernels of the same names on accelerators, in Triton."""
