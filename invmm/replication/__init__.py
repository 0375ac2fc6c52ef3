"""What counts as a replica: similarity networks and the calibration of their threshold."""
