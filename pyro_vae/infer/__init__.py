"""Objectives, importance weights, the compiled step and the training loop over a model/guide pair."""
