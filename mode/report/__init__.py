"""Rendered tables, figures and the HTML page."""
