"""Images with stable ids, captions, splits and copies, whatever state their files are in."""
