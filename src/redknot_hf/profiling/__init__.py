"""Finding the heads that need everything: profiles of a model's KV heads, and plans made of them."""

from .calibration import calibration_kinds, calibration_prompts
from .fidelity import fidelity
from .head_profile import HeadProfile
from .profiler import profile_heads
from .prompt import Prompt
from .texts import python_texts, read_texts

__all__ = [
    "HeadProfile",
    "Prompt",
    "calibration_kinds",
    "calibration_prompts",
    "fidelity",
    "profile_heads",
    "python_texts",
    "read_texts",
]
