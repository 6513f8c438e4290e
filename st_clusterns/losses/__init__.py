"""Every step: the losses, their terms and their state."""
