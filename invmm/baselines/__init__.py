"""Published membership-inference scores, to compare with the measures of memorization."""
