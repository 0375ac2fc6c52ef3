"""The folder of a run: who may write into it, and reading what it holds; no torch here."""
