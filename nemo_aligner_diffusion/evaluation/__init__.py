"""Figures, diversity measures and the HTML report."""
