"""Membership scores of others, to stand beside the measures of memorization."""
