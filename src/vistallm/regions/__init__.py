"""Regions: masks <-> polygons (masks.py), regions <-> answer text (codec.py), image <-> square (frame.py)."""
