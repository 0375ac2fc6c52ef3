"""InvMM: the noise distribution nearest to the prior whose samples all replicate the image."""
