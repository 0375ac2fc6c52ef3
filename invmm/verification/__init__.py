"""Does a record hold: its numbers recomputed, fresh samples drawn, and a verdict."""
