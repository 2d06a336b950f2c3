"""Imagen-style cascades on MindSpore: `from pipeline import Cascade`."""

from typing import TYPE_CHECKING, Any

from pipeline.runtime import prepare_environment

if TYPE_CHECKING:
    from pipeline.generate.cascade import Cascade

__all__ = ["Cascade"]

prepare_environment()


def __getattr__(name: str) -> Any:
    if name == "Cascade":  # late, because it imports MindSpore
        from pipeline.generate.cascade import Cascade

        return Cascade
    raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
