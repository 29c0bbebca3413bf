"""Sora: a folder of labelled videos becomes a served video classifier that retrains itself every night."""

__version__ = "0.1.0"
