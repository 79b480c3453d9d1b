"""Figures of merit of a mixture of expert policies."""
