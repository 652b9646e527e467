"""The token-label loss: in closed form, with dense targets as its reference, and as a Triton kernel."""
