"""Measuring with Lightning's `predict`: processes, devices, signals and trackers."""
