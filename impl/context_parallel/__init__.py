"""Attention over a sequence that is split over a context-parallel group.

Every rank holds some chunks of the sequence (`zigzag`) and computes attention block by block
(`blocks`): a chunk of queries against a chunk of keys. The algorithms differ in how keys come to
queries, and are interchangeable by name (`attention.ALGORITHMS`):

| algorithm | forward | backward | heads |
|---|---|---|---|
| `all_gather` | all-gather K and V | all-gather K and V, reduce-scatter dK and dV | any |
| `ring` | send K and V on, n - 1 times | K and V n - 1 times, dK and dV n times | any |
| `ulysses` | all-to-all of Q, K, V and the output | the same back | divide by cp |
| `hierarchical` | `ulysses` over the inner ranks, `ring` over the outer | | divide by inner |
"""
