"""Plots of runs as data (`plot`), what they show (`runs`, `images`), and how they are drawn (`svg`, `png`)."""
