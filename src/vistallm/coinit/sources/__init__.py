"""Sources of instruction data, one module per dataset family, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable

from vistallm.coinit.sources.base import Source, SourceOptions

SOURCES: dict[str, Callable[[SourceOptions], Source]] = {}
