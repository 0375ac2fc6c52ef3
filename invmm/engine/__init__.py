"""The engine: many measurements share one network through requests, slots and outcomes."""
