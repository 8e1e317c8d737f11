"""A trace in the format of Azure's LLM inference traces."""

from __future__ import annotations

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.4799600,3180,8
2023-11-16 18:17:09.9799600,110,27
"""
