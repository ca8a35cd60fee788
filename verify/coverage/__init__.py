"""Coverage of the space of cases: which values, and which pairs of values, were exercised together,
and draws that reach for those which were not yet."""
