"""Evicts the activations of a PyTorch training step into a backup: see ``ttmfs.client.activations``."""

from .client.activations import EvictActivations, Evictions

__all__ = ["EvictActivations", "Evictions"]
