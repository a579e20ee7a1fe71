"""VistaLLM: one vision-language model that captions, answers, points, boxes and segments over one image or several."""

import gc
from typing import Any

__version__ = "0.1.0"
__all__ = ["VistaLLM"]


def __getattr__(name: str) -> Any:
    """Import the model for users on first use: `import vistallm` alone needs no torch."""
    if name == "VistaLLM":
        collects = gc.isenabled()
        gc.disable()  # what the imports make stays; looking through it for garbage is a sixth of their time
        try:
            from vistallm.api import VistaLLM
        finally:
            if collects:
                gc.enable()
        return VistaLLM
    raise AttributeError(f"module 'vistallm' has no attribute {name!r}")
