"""Decides which model runs where and how warm. The core is pure; the driver touches the world."""
