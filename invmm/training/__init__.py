"""Small models whose training set is known, copies included, trained with Lightning's `fit`."""
