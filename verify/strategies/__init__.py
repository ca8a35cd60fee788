"""Hypothesis strategies: layouts, and cases of every concept, valid ones and ones to be refused."""
