"""The kernels' races: the vocabulary-wide step."""
