"""Distributed, large-scale training of the S3-Rec sequential recommender."""

__docformat__ = "restructuredtext"

__version__ = "0.1.0"
