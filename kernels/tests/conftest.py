"""Kernels run in Triton's interpreter where there is no accelerator."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before the modules are imported
