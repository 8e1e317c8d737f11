"""Judgements: where a model goes, who gives way, what staying warm is worth. Pure.

It imports state and signals."""
