"""Stages, the accelerate loop, data sets and evaluation."""
