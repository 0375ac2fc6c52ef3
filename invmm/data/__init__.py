"""Data sets: images with stable ids, captions, splits and copies; broken files end no run."""
