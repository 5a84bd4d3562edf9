"""Estimates of log p(x) and what they rest on."""
