"""VistaLLM: one vision-language model that captions, answers, points, boxes and segments over one image or several."""

__version__ = "0.1.0"
