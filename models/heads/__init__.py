"""Heads: how a hidden state becomes a sample."""
