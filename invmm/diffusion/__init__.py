"""Noise schedules, prediction types, guidance and sampling, on torch and diffusers' schedulers."""
