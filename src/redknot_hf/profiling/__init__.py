"""Finding the heads that need everything: profiles of a model's KV heads, and plans made of them."""

from .calibration import calibration_prompts, read_texts
from .fidelity import fidelity
from .head_profile import HeadProfile
from .profiler import profile_heads
from .prompt import Prompt

__all__ = ["HeadProfile", "Prompt", "calibration_prompts", "fidelity", "profile_heads", "read_texts"]
