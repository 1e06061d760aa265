"""Descriptions of charts, and the one renderer that draws them as PNG, PDF or SVG."""
