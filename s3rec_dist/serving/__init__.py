"""Models for serving: files for other runtimes, indexes of item vectors, and a service."""
