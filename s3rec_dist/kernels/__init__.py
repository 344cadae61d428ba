"""Fused operators. Each folder holds one contract, its plain reference and its fast backends."""
