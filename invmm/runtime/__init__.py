"""Lightning: measuring with `predict`, training with `fit`, and watching both."""
