"""Imagen-style cascades on MindSpore: `from pipeline import Cascade`."""

from typing import TYPE_CHECKING, Any

from pipeline.runtime import prepare_environment

if TYPE_CHECKING:
    from pipeline.generate.cascade import Cascade

__all__ = ["Cascade"]

# Before anything can import MindSpore, which reads parts of its environment only once.
prepare_environment()


def __getattr__(name: str) -> Any:
    # Lazily, as this imports MindSpore.
    if name == "Cascade":
        from pipeline.generate.cascade import Cascade

        return Cascade

    raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
