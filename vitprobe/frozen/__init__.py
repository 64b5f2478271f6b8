"""A model that is run and not trained: on which device, in which precision, one guarded forward pass."""
