"""The commands. The only room that knows Hydra; heavy rooms are imported when a command runs."""
