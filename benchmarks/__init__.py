"""Measurements and the sweep over the models of other packages."""
