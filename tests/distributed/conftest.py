"""The inputs of the integration tests."""

from integration.conftest import finished, images, model

__all__ = ["finished", "images", "model"]
