"""Backbone, heads and text encoders."""
