"""Adapters: one per family of diffusion models, behind the engine's `Network` Protocol."""
