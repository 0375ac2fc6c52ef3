"""Noise schedules, conversions and sampling: torch and diffusers schedulers only."""
