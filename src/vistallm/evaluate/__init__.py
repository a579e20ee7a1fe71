"""Evaluation: generated text -> parsed answers -> scores -> report page."""
