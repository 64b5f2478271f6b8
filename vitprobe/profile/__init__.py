"""The analysis of a model on images, and its result."""
