"""Whole models: training, sampling."""
