"""VistaLLM: one vision-language model that captions, answers, points, boxes and segments over one image or several."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["VistaLLM"]


def __getattr__(name: str) -> Any:
    """Import the model for users on first use: `import vistallm` alone needs no torch."""
    if name == "VistaLLM":
        from vistallm.api import VistaLLM

        return VistaLLM
    raise AttributeError(f"module 'vistallm' has no attribute {name!r}")
