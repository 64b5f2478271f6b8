"""Seeing the attention of a running model: hooks on its blocks, interception of the attention calls inside."""
