"""A run: the data loader, the batch sampler, callbacks, and `adapt`."""
