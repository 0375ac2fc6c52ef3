"""The probability that a sample from the prior replicates an image: counted, split, certified."""
