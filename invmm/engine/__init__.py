"""Requests, slots and outcomes: how many measurements share one network."""
