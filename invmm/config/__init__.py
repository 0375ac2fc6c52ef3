"""From a command line to a checked run: composed by Hydra, built from typed classes."""
