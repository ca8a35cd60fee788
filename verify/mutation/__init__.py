"""The mutation score: which properties catch which mutants, how soon, and what survives."""
