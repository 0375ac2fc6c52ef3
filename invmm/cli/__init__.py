"""The commands; heavy rooms are imported when a command runs."""
