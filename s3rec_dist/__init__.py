"""Distributed, large-scale training of the S3-Rec sequential recommender."""

__version__ = "0.1.0"
